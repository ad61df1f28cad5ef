"""The public names: their signatures, that tests use them, and the golden files.

A new name goes into `SIGNATURES` (and its methods into `METHODS`), a new golden file
either into the table of formulas or into `MET_ELSEWHERE`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import re
import types
from pathlib import Path

import pytest
from losses import golden

import keras_distill as kd

TESTS = Path(__file__).parent

# What users write against: names, order and defaults. More keywords may follow.
SIGNATURES = {
    "BaseDistiller": "student, *, alpha=1.0, student_inputs=None, "
    "student_from_logits=None, output_weights=None, unlabelled=-1, name=None",
    "BaseDistiller.compile": "self, optimizer='rmsprop', loss=None, loss_weights=None, "
    "metrics=None, weighted_metrics=None, run_eagerly=False, steps_per_execution=1, "
    "jit_compile='auto', auto_scale_loss=True, *, check_finite=False, "
    "skip_nonfinite=False, log_gradient_share=0, gradient_policy=None, "
    "across_replicas=False",
    "BaseDistiller.add_term": "self, name, weight=1.0",
    "BaseDistiller.add_log": "self, name",
    "BaseDistiller.compute_terms": "self, x, y, sample_weight, training",
    "BaseDistiller.log_metric": "self, name, values, sample_weight=None",
    "BaseDistiller.mean": "self, values, sample_weight=None",
    "Distiller": "student, teacher, *, temperature=None, alpha=0.1, beta=None, "
    "links=(), soft_loss='auto', student_inputs=None, student_from_logits=None, "
    "output_weights=None, unlabelled=-1, save_teacher=False, name=None",
    "Link": "student_layer, teacher_layer, loss, *, weight=1.0, adapter=None, "
    "teacher_adapter=None, name=None",
    "LearnedTemperature": "low=1.0, high=21.0, *, initial=None, strength=1.0, "
    "ramp_up=10, name=None",
    "ClipToMain": "",
    "explain": "distiller, batch",
    "suggest_links": "student, teacher, loss, *, weight=1.0, adapter='auto'",
    # Presets
    "HintDistiller": "student, teacher, hints, *, joint=False, weight=1.0",
    "HintDistiller.fit_hints": "self, x, y=None, epochs=1, optimizer=None",
    "AttentionDistiller": "student, teacher, layers, *, p=2, weight=1000.0",
    "ActivationBoundaryDistiller": "student, teacher, layers, *, margin=1.0, "
    "weight=0.003",
    "FlowDistiller": "student, teacher, layers, *, method='fsp', rank=1, weight=1.0",
    "RelationalDistiller": "student, teacher, *, embedding, distance_weight=1.0, "
    "angle_weight=2.0, similarity_weight=0.0, probabilistic_weight=0.0, "
    "congruence_weight=0.0, alpha=1.0, soft_loss=None",
    "ContrastiveDistiller": "student, teacher, *, embedding, num_samples, "
    "embedding_dim=128, negatives=16384, temperature=0.07, momentum=0.5, weight=0.8",
    "ReusedTeacherClassifier": "student, teacher, *, features",
    "ReusedTeacherClassifier.deploy": "self",
    "InheritExplore": "student, teacher, *, features",
    # Without a teacher
    "OneEnsemble": "stem, branches, *, gate=None, temperature=3.0, branch_weight=1.0, "
    "ensemble_weight=1.0, soft_weight=1.0, ramp_up=0, name=None",
    "OneEnsemble.deploy": "self, which",
    "MutualLearning": "networks, *, temperature=1.0, updates='in_turn'",
    "TeacherFree": "student, regularizer=None, *, alpha=0.9, beta=0.1",
    "generations.born_again": "build, compile_args, data, *, generations=3, epochs, "
    "validation_data=None, callbacks=(), directory=None, method='ban'",
    "generations.label_refinery": "build, compile_args, data, *, generations=3, "
    "epochs, validation_data=None, callbacks=(), directory=None",
    "generations.teacher_assistant": "build, compile_args, data, *, sizes, epochs, "
    "validation_data=None, callbacks=(), directory=None",
    "generations.noisy_student": "build, compile_args, data, *, unlabelled, "
    "generations=3, epochs, validation_data=None, callbacks=(), directory=None",
    # Teachers
    "teachers.Model": "model, *, inputs=None, from_logits=None, dtype=None",
    "teachers.Teacher.__call__": "self, x, taps, temperature",
    "teachers.Ensemble": "models, combine='arithmetic', weights=None",
    "teachers.Specialists": "generalist, specialists, classes, *, top=1",
    "teachers.train_specialists": "generalist, build, data, num_specialists",
    "teachers.correct_bias": "model, data, shares",
    "teachers.Cache.build": "teacher, dataset, path, *, taps=(), top_k=None, "
    "temperatures=(), dtype='float16', views=1, augment=None, batch_size=128, "
    "key='content', shard=None",
    "teachers.Cache.open": "path, *, augment=None",
    "teachers.Cache.attach": "self, dataset",
    "teachers.Cache.verify": "self, teacher, dataset, rows=256",
    "teachers.Cache.join": "paths, path",
    "teachers.select_transfer_set": "teacher, data, *, method='graph', "
    "embedding=None, threshold=None",
    "teachers.suggest_temperature": "teacher, data, perplexity=2.0, *, plot=None",
    # Around training
    "schedules.Schedule": "name, values, *, every='epoch'",
    "schedules.StopTeacher": "epoch",
    "data.per_epoch": "make_dataset, seed=0",
    "callbacks.Backup": "path, save_freq='epoch'",
    "report.compare": "models, data",
    "monitoring.DistillationBoard": "log_dir=None, validation_data=None",
    # Losses
    "losses.SoftTarget": "temperature=4.0, scale_by_temperature=True, divergence='kl', "
    "standardize=False",
    "losses.LogitMSE": "",
    "losses.DecoupledKD": "alpha=1.0, beta=8.0, temperature=4.0",
    "losses.DIST": "beta=1.0, gamma=1.0, temperature=1.0",
    "losses.MultiLevelLogit": "temperatures=(2, 3, 4, 5, 6)",
    "losses.ConfidencePenalty": "beta=0.1",
    "losses.VirtualTeacher": "correct=0.99, temperature=20.0",
    "losses.Hint": "",
    "losses.AttentionTransfer": "p=2",
    "losses.ActivationBoundary": "margin=1.0",
    "losses.NeuronSelectivity": "",
    "losses.VariationalInformation": "epsilon=1e-5",
    "losses.MarginReLU": "margin",
    "losses.FactorTransfer": "p=1",
    "losses.HierarchicalContext": "levels=(4, 2, 1)",
    "losses.FlowOfProcedure": "",
    "losses.SingularValue": "rank=1, beta=8.0",
    "losses.RelationalDistance": "",
    "losses.RelationalAngle": "",
    "losses.ProbabilisticTransfer": "",
    "losses.SimilarityPreserving": "",
    "losses.CorrelationCongruence": "gamma=0.4, order=2",
    # Adapters
    "adapters.Regressor": "",
    "adapters.VariationalHead": "",
    "adapters.Connector": "",
    "adapters.Paraphraser": "",
    "adapters.Paraphraser.pretrain": "self, teacher, layer, data",
    "adapters.Translator": "",
    "adapters.Fusion": "",
    "adapters.MaskedGeneration": "",
    "adapters.margins": "batch_normalization",
}
# Further attributes, whose signatures are as said elsewhere.
METHODS = {
    "BaseDistiller": ["term_weights", "alpha", "summary", "fit", "evaluate", "predict"],
    "Distiller": ["teacher", "temperature", "beta", "soft_loss"],
    "OneEnsemble": ["from_model"],
    "BeYourOwnTeacher": ["from_model", "deploy", "predict"],
    "MutualLearning": ["networks", "optimizers"],
    "losses.DistillationLoss": ["needs_labels", "needs_teacher", "call"],
    "teachers.Selection": ["filter", "report"],
    "teachers.Teacher": ["resolve", "tap_specs", "heads", "fingerprint", "variables"],
}
# Results that users reach by an attribute, and do not name.
REACHED_AS = {"generations.Table": "table", "generations.Generations": "models"}
# Golden files that no formula over losses meets, and the test that meets them.
MET_ELSEWHERE = {
    "ban_cwtm": "test_generations.py",
    "ban_dkpp": "test_generations.py",
    "ban_kd": "test_generations.py",
    "byot_paper": "selfdistill/test_exits.py",
    "crd": "offline/test_contrastive.py",
    "dml": "online/test_mutual.py",
    "kd_ensemble_arithmetic": "test_teachers.py",
    "kd_ensemble_geometric": "test_teachers.py",
    "kdsvd_grad_clip": "test_policies.py",
    "label_smoothing": "selfdistill/test_teacher_free.py",
    "one": "online/test_one.py",
    "one_rampup": "online/test_one.py",
    "tfkd_reg": "selfdistill/test_teacher_free.py",
}
# Variants that also circulate, which we do not offer, and why.
NOT_OFFERED = {
    "byot": "a re-implementation by others; `byot_paper` is the paper's",
    "byot_selfdistill_final": "norms over the whole batch, not rows: batch size counts",
    "cc_repdistiller": "depends on the order of the rows in the batch",
    "mlld_official": "needs two views of each row and thresholds of its own code",
}


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """The text of every test file but this one."""
    files = [path for path in TESTS.rglob("test_*.py") if path != Path(__file__)]
    return {str(path.relative_to(TESTS)): path.read_text() for path in files}


def found(name: str):
    return functools.reduce(getattr, name.split("."), kd)


def expected_parameters(text: str) -> list[tuple[str, bool, object]]:
    """Name, whether keyword-only, and default of the parameters in `text`."""
    arguments = ast.parse(f"def f({text}): ...").body[0].args
    none = inspect.Parameter.empty
    plain = arguments.args
    defaults = [none] * (len(plain) - len(arguments.defaults))
    defaults += [ast.literal_eval(d) for d in arguments.defaults]
    keywords = [
        none if d is None else ast.literal_eval(d) for d in arguments.kw_defaults
    ]
    return [(a.arg, False, d) for a, d in zip(plain, defaults, strict=True)] + [
        (a.arg, True, d) for a, d in zip(arguments.kwonlyargs, keywords, strict=True)
    ]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    actual = inspect.signature(found(name)).parameters
    expected = expected_parameters(SIGNATURES[name])
    positional = [
        p.name
        for p in actual.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    order = [parameter for parameter, keyword_only, _ in expected if not keyword_only]
    assert positional[: len(order)] == order
    for parameter, keyword_only, default in expected:
        if parameter not in actual:  # one of the keywords that are passed on
            assert any(p.kind is p.VAR_KEYWORD for p in actual.values()), parameter
            continue
        assert actual[parameter].default == default, parameter
        if keyword_only:
            assert actual[parameter].kind is inspect.Parameter.KEYWORD_ONLY, parameter


@pytest.mark.parametrize(
    ("owner", "attribute"), [(o, a) for o, names in METHODS.items() for a in names]
)
def test_methods_and_properties(owner, attribute):
    assert hasattr(found(owner), attribute)


def public_names(module, prefix="") -> list[str]:
    """Everything in `__all__`, also of the modules in there."""
    names = []
    for name in module.__all__:
        value = getattr(module, name)
        if not isinstance(value, types.ModuleType):
            names.append(prefix + name)
        elif hasattr(value, "__all__"):
            names += public_names(value, f"{prefix}{name}.")
    return names


@pytest.mark.parametrize("name", sorted({*public_names(kd), *SIGNATURES}))
def test_every_public_name_is_used_by_a_test(name, sources):
    assert found(name).__doc__
    last = REACHED_AS.get(name, name.split(".")[-1])
    if last.startswith("__"):
        return
    assert any(re.search(rf"\b{last}\b", text) for text in sources.values()), name


def test_what_a_module_offers_is_sorted_into_all():
    for name in public_names(kd):
        assert operator.attrgetter(name)(kd) is not None
    assert len(set(kd.__all__)) == len(kd.__all__)


def test_nothing_public_is_unfinished():
    for path in Path(kd.__file__).parent.rglob("*.py"):
        # The base of all losses is abstract, and so is that of all adapters.
        if path.parts[-2:] in {("losses", "base.py"), ("adapters", "base.py")}:
            continue
        assert "raise NotImplementedError" not in path.read_text(), path


METHODS_OF_FILES = sorted(
    {path.stem.split("__")[0] for path in golden.FOLDER.glob("*")}
)


@pytest.mark.parametrize("method", METHODS_OF_FILES)
def test_every_golden_file_is_met(method, sources):
    if method in golden.FORMULAS:
        pattern = rf"[\"']{method}[\"']"
        assert any(re.search(pattern, text) for text in sources.values()), method
    elif method in MET_ELSEWHERE:
        text = sources[MET_ELSEWHERE[method]]
        # Some tests put the name together from its parts.
        assert method in text or f"{method.rpartition('_')[0]}_{{" in text
    else:
        assert method in NOT_OFFERED, f"Nothing meets the golden file {method}."


def test_the_tables_hold_no_golden_file_that_does_not_exist():
    known = set(METHODS_OF_FILES)
    assert {*MET_ELSEWHERE, *NOT_OFFERED} <= known
    assert not set(golden.FORMULAS) & set(NOT_OFFERED)
