"""What training under `tf.distribute` needs, and nothing else does."""
