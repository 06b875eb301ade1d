"""The names that users may rely on."""

import unispect

NAMES = [
    "Evaluation",
    "Finding",
    "Inspector",
    "Record",
    "Region",
    "UnispectError",
    "evaluate",
    "read_folder",
    "write_products",
    "write_report",
]


def test_public_names_are_these() -> None:
    assert list(unispect.__all__) == NAMES
    assert set(dir(unispect)) >= {*NAMES, "__version__"}


def test_every_public_name_is_there_and_documented() -> None:
    for name in NAMES:
        assert getattr(unispect, name).__doc__, name


def test_an_import_of_its_module_does_not_hide_a_function() -> None:
    from unispect import evaluate
    from unispect import evaluation as module

    assert callable(evaluate)
    assert module.evaluate is evaluate
