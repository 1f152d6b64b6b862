"""The space of a search: which settings there are, and what each asks of the pipeline."""

import sys

import pytest

from jobs.core.options import load_config
from jobs.searching.space import Setting, config_of, format_command, format_single_command, space


def config(**options):
    return load_config(None, [(key.replace("__", "."), value) for key, value in options.items()])


def keys(**options) -> list[tuple[str, ...]]:
    return [setting.key for setting in space(config(**options))]


def test_every_depth_with_every_recovery_quantizer_and_its_bits():
    options = {"search__depths": "[0, 3]", "search__recoveries": "[none, lora]", "search__bits": "[3, 4]"}
    found = keys(**options, search__quantizers="[none, int8, nf4, rtn]")
    assert found == [
        (depth, recovery, rounded)
        for depth in ("0", "3")
        for recovery in ("none", "lora")
        for rounded in ("none16", "int88", "nf44", "rtn3", "rtn4")  # int8 and nf4 have no choice
    ]


def test_widths_are_a_dimension():
    options = {"search__depths": "[0, 2]", "search__recoveries": "[none]", "search__quantizers": "[none]"}
    found = space(config(**options, search__widths="[1.0, 0.5]"))
    assert [setting.key[0] for setting in found] == ["0", "0x0.5", "2", "2x0.5"]
    assert [setting.label for setting in found] == ["original", "width 0.5", "2 out", "2 out, width 0.5"]
    own = config_of(config(), found[3]).prune
    assert (own.layers, own.width) == (2, 0.5)
    with pytest.raises(ValueError, match=r"search\.widths"):
        config(search__widths="[1.5]")


def test_what_is_listed_twice_is_one_setting():
    assert keys(search__depths="[2, 2]", search__recoveries="[none]", search__quantizers="[none, none]") == [
        ("2", "none", "none16")
    ]


def test_bits_that_a_quantizer_does_not_have():
    with pytest.raises(ValueError, match=r"search\.bits \[16\] has none that awq has"):
        keys(search__quantizers="[awq]", search__bits="[16]")


def test_an_empty_space_is_refused():
    with pytest.raises(ValueError, match=r"search\.depths"):
        config(search__depths="[]")


def test_a_setting_changes_its_own_fields_and_no_others():
    given = config(prune__search="greedy", quantize__group_size="32", recover__rank="4", evaluate__limit="30")
    own = config_of(given, Setting(5, "lora", "int8", 8))
    assert (own.prune.layers, own.recover.train, own.quantize.method, own.quantize.bits) == (5, ["lora"], "int8", 8)
    assert (own.prune.search, own.recover.rank, own.quantize.group_size) == ("greedy", 4, 32)
    assert (
        own.evaluate == given.evaluate
        and own.model_copy(update={name: getattr(given, name) for name in ("prune", "recover", "quantize")}) == given
    )
    assert config_of(given, Setting(0, "none", "none", 16)).recover == given.recover


def test_further_grids_are_joined_and_a_setting_counts_once():
    given = config(
        search__depths="[0, 4]",
        search__recoveries="[none]",
        search__quantizers="[none]",
        search__also="[{widths: [0.5, 0.75], recoveries: [lora]}, {depths: [4]}]",
    )
    assert [(each.depth, each.width, each.recovery) for each in space(given)] == [
        *((0, 1.0, "none"), (4, 1.0, "none")),
        *((0, 0.5, "lora"), (0, 0.75, "lora")),
    ]


@pytest.mark.parametrize(
    ("also", "words"),
    [
        ("[{depth: [4]}]", "did you mean 'search.also.0.depths'"),
        ("[{recoveries: [lorra]}]", "lorra"),
        ("[{widths: [0.5], recoveries: [patch]}]", "full width only"),
    ],
)
def test_further_grids_are_checked(also, words):
    with pytest.raises(ValueError, match=words):
        config(search__also=also)


@pytest.mark.parametrize(("limit", "screen", "images"), [("null", "8", 8), ("30", "8", 8), ("5", "8", 5)])
def test_the_screen_is_a_cheap_evaluation_of_a_part(limit, screen, images):
    given = config(evaluate__limit=limit, search__screen_images=screen)
    cheap = config_of(given, Setting(2, "none", "none", 16), screen=True).evaluate
    assert cheap.limit == images and not cheap.controls and cheap.timed_runs < given.evaluate.timed_runs


@pytest.mark.parametrize(
    ("setting", "label"),
    [
        (Setting(0, "none", "none", 16), "original"),
        (Setting(4, "none", "none", 16), "4 out"),
        (Setting(0, "none", "awq", 4), "awq 4 bit"),
        (Setting(4, "qlora", "rtn", 3), "4 out, qlora, rtn 3 bit"),
    ],
)
def test_labels(setting, label):
    assert setting.label == label


def test_what_is_stored_alike_runs_alike():
    kernels = {(q, b): Setting(0, "none", q, b).kernels for q, b in [("awq", 4), ("rtn", 4), ("awq", 3), ("nf4", 4)]}
    assert kernels["awq", 4] == kernels["rtn", 4] != kernels["nf4", 4]
    assert kernels["awq", 3] == Setting(0, "none", "none", 16).kernels  # simulated: stored in 16 bits


@pytest.mark.parametrize("mode", [["--resume"], ["--resume", "true"], ["--search.resolve_only=true"], []])
def test_the_command_of_one_setting_is_a_space_of_one(monkeypatch, mode):
    given = ["search", "--config", "c.yaml", "--search.depths", "[0, 4]", *mode, "--run_dir", "/a/here"]
    monkeypatch.setattr(sys, "argv", [*given, "--search.budget.memory_gib", "1"])
    words = format_single_command(Setting(4, "lora", "rtn", 3), "/a/here")
    assert words.startswith("python -m jobs.search --config c.yaml --search.depths '[0, 4]' --run_dir /a/here ")
    from shlex import split

    from jobs.core.command import parse

    chosen = parse([word for word in split(words)[3:] if word not in ("--config", "c.yaml")])
    assert space(chosen) == [Setting(4, "lora", "rtn", 3)]
    assert chosen.search.screen_images is None and not chosen.search.resume and not chosen.search.resolve_only
    assert chosen.run_dir == "/a/here/alone/4-lora-rtn3" and chosen.search.budget.memory_gib is None


def test_the_command_that_is_recorded_is_whole(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["joint", "--run_dir", "/a/b c"])
    assert format_command().endswith(" --run_dir '/a/b c'")
