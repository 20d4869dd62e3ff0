"""Every error says what happened in one sentence or a few, and is also the built-in that fits."""

import inspect
import pickle
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

import backtrail
from backtrail import errors
from backtrail.errors import BacktrailError

BUILT_IN = {
    "BadBatch": TypeError,
    "BadCheckpoint": ValueError,
    "BadIds": ValueError,
    "BadLoss": ValueError,
    "BadOptimizer": ValueError,
    "BadPolicy": ValueError,
    "BadQuery": ValueError,
    "BadReduction": ValueError,
    "BadReference": ValueError,
    "BadSetting": ValueError,
    "BrokenFile": RuntimeError,
    "BadTotal": ValueError,
    "CannotRenormalize": ValueError,
    "ChangedByCheck": RuntimeError,
    "ChangedOptimizerState": RuntimeError,
    "ChangedOutside": RuntimeError,
    "CoarseNoise": TypeError,
    "ComplexParameter": TypeError,
    "CoupledLoss": ValueError,
    "CoupledRows": ValueError,
    "DamagedBank": RuntimeError,
    "DamagedEmbeddings": RuntimeError,
    "DamagedFile": RuntimeError,
    "DamagedInfluence": RuntimeError,
    "DifferentEmbeddings": ValueError,
    "DifferentInfluence": ValueError,
    "Diverged": RuntimeError,
    "EmbeddedElsewhere": ValueError,
    "EmbeddingGrew": RuntimeError,
    "EmptyRun": ValueError,
    "FedOfAnotherForm": ValueError,
    "FolderTaken": FileExistsError,
    "IllFormedInfluence": ValueError,
    "ImpossibleWindow": ValueError,
    "LiveParameter": ValueError,
    "MissingExtra": ImportError,
    "MissingState": KeyError,
    "NeverTrainedOn": ValueError,
    "NoCheckpoints": ValueError,
    "NoClasses": ValueError,
    "LateSecondDerivative": RuntimeError,
    "NoDerivative": RuntimeError,
    "NoDraw": ValueError,
    "NoLabels": KeyError,
    "NonFiniteInfluence": ValueError,
    "NoOutputs": TypeError,
    "NoSecondDerivative": RuntimeError,
    "NoRegimes": ValueError,
    "NoRows": ValueError,
    "NoRowLosses": ValueError,
    "NoSuchState": KeyError,
    "NotAnInfluence": FileNotFoundError,
    "NotARun": FileNotFoundError,
    "NotCaptured": RuntimeError,
    "NotCut": ValueError,
    "NotEmbedded": KeyError,
    "NotEmbeddings": FileNotFoundError,
    "NotEntered": RuntimeError,
    "NotFinite": ValueError,
    "NotInFile": KeyError,
    "NotObserved": KeyError,
    "OtherOptimizer": RuntimeError,
    "OtherRun": ValueError,
    "OtherSlots": ValueError,
    "RenormalizedEmbedding": ValueError,
    "ReplayMismatch": RuntimeError,
    "RowsNotReadable": ValueError,
    "RunExists": FileExistsError,
    "SeveralLabels": ValueError,
    "SharedStorage": ValueError,
    "SparseGradient": RuntimeError,
    "StaleGradient": RuntimeError,
    "StrayedRerun": RuntimeError,
    "TooFewSteps": ValueError,
    "TooFewWindows": ValueError,
    "TooLittleMemory": RuntimeError,
    "TwoViewpoints": ValueError,
    "UnexplainedGradient": RuntimeError,
    "UnfinishedEmbeddings": RuntimeError,
    "UnfinishedInfluence": RuntimeError,
    "UnknownId": KeyError,
    "UnknownQuery": KeyError,
    "UnknownSample": KeyError,
    "UnreadableData": TypeError,
    "UnrepeatableRows": RuntimeError,
    "UnsupportedOptimizer": TypeError,
    "UnusedOption": TypeError,
    "UnwatchableLoader": ValueError,
    "UnwatchedStep": RuntimeError,
    "WithoutQueries": ValueError,
    "WrongData": ValueError,
    "WrongDerivative": RuntimeError,
    "WrongFormat": ValueError,
    "WrongModel": ValueError,
}
SAMPLES: dict[Any, Any] = {
    int: 3,
    float: 0.5,
    str: "word",
    bool: True,
    Path: Path("folder"),
    object: 7,
    Exception: ZeroDivisionError("division by zero"),
}


def argument(name: str, annotation: Any) -> Any:
    """Something of the annotated type."""
    if annotation in SAMPLES:
        return SAMPLES[annotation]
    kinds = get_args(annotation)
    if get_origin(annotation) is tuple:
        return tuple(argument(name, kind) for kind in kinds if kind is not Ellipsis)
    if "Mapping" in str(annotation):
        return {"seed": (0, 1)}
    if "Sequence" in str(annotation):
        return [argument(name, kinds[0])]
    return argument(name, kinds[0])


def made(name: str) -> BacktrailError:
    """An error of the class of this name, with plausible values."""
    kind = getattr(errors, name)
    given, keywords = [], {}
    for parameter in inspect.signature(kind.__init__).parameters.values():
        if parameter.name == "self":
            continue
        value = argument(parameter.name, parameter.annotation)
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            keywords[parameter.name] = value
        else:
            given.append(value)
    found: BacktrailError = kind(*given, **keywords)
    return found


def test_the_table_is_complete() -> None:
    """No error of the library is missing from it."""
    kinds = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}
    assert kinds - {"BacktrailError"} == set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_error_is_also_the_built_in_that_fits(name: str) -> None:
    """Either can be caught; the sentence is plain, ends with a full stop, and survives a pickle."""
    error = made(name)
    assert isinstance(error, BUILT_IN[name])
    assert isinstance(error, BacktrailError)
    sentence = str(error)
    assert sentence == error.args[0]
    assert sentence.endswith((".", "?"))
    assert "  " not in sentence
    assert sentence[0] not in "'\""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == sentence


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            errors.BadSetting("chunk", 0, "a positive integer or None"),
            "Invalid chunk=0: expected a positive integer or None.",
        ),
        (
            errors.BadSetting("method", "dvee", "'dve' or 'dit'"),
            "Invalid method='dvee': expected 'dve' or 'dit'. Did you mean 'dve'?",
        ),
        (
            errors.UnusedOption("seed", 1, call="select_coreset(method='loss')", takes=["among"]),
            "Invalid seed=1: select_coreset(method='loss') does not use it; it takes among. "
            "Leave seed= out.",
        ),
        (
            errors.ImpossibleWindow(5, 3, 4),
            "Invalid step range (5, 3): expected 0 <= start <= stop <= 4 (number of steps).",
        ),
        (
            errors.UnknownQuery("loss[2", ["loss[2]", "loss[9]"]),
            "There is no query 'loss[2'. Available: index 0 to 1, or a name: 'loss[2]', 'loss[9]'. "
            "Did you mean 'loss[2]'?",
        ),
        (
            errors.NotEmbedded([10], [100]),
            "These embeddings were not built for state 10; available states: 100. Use one of "
            "these, or call embed(run, observed_at=...) with the state.",
        ),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, Exception) else "",
)
def test_sentences_name_values_and_what_to_type(error: Exception, sentence: str) -> None:
    """Word by word."""
    assert str(error) == sentence


def test_long_values_are_not_dumped() -> None:
    """A data set or an array in a message would bury the message."""
    assert str(errors.BadSetting("test", list(range(999)), "rows")) == (
        "Invalid test=<list>: expected rows."
    )


def test_a_missing_folder_is_a_missing_file(tmp_path: Path) -> None:
    """As with any function that opens something."""
    with pytest.raises(FileNotFoundError, match="holds no influence"):
        backtrail.open_influence(tmp_path / "missing")
