"""The tables of tiles: complete, compiled by the gate to the last entry, and whose they are."""

import pytest
import torch

from medgpt_kernels import aot, tiles

ALL = (*tiles.FAMILIES, tiles.INTERPRETER)


@pytest.fixture(scope="module")
def asked():
    """(family, kernel, key) of every entry that a launch of the ahead-of-time gate takes."""
    pytest.importorskip("triton")
    taken, entry = set(), tiles.entry

    def noting(family, kernel, keys):
        key, tile = entry(family, kernel, keys)
        taken.add((family, kernel, key))
        return key, tile

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "entry", noting)
        aot.kernels()
    return taken


@pytest.mark.parametrize("family", tiles.FAMILIES)
def test_the_gate_compiles_every_entry(family, asked):
    entries = {(family, kernel, key) for kernel, t in tiles.table(family).items() for key in t}
    assert entries == {taken for taken in asked if taken[0] == family}


def test_families_name_the_same_kernels():
    names = {family: set(tiles.table(family)) for family in ALL}
    assert all(found == names["sm_90"] for found in names.values())


@pytest.mark.parametrize("family", ALL)
def test_sizes_are_powers_of_two(family):
    for kernel, choices in tiles.table(family).items():
        for key, tile in choices.items():
            for name, value in tile.items():
                known = name.startswith("BLOCK_") or name in ("num_warps", "SPLIT", "CHUNK")
                assert known or name in ("num_stages", "POLY_EXP2"), (kernel, key, name)
                assert not known or value & (value - 1) == 0 < value, (kernel, key, name)


@pytest.mark.parametrize(
    ("capability", "kilobytes", "family"),
    [
        ((8, 0), 163, "sm_80"),
        ((8, 7), 163, "sm_80"),
        ((8, 6), 99, "sm_86"),
        ((8, 9), 99, "sm_86"),
        ((9, 0), 227, "sm_90"),
        ((10, 0), 227, "sm_100"),
        ((10, 3), 227, "sm_100"),
        ((11, 0), 227, "sm_100"),
        ((12, 0), 99, "sm_86"),
        ((7, 5), 64, "sm_86"),
        ((13, 0), 227, "sm_100"),  # no such card yet
    ],
)
def test_nearest_family(capability, kilobytes, family):
    assert tiles.nearest_family(capability, kilobytes * 1024) == family


def test_the_most_particular_key_wins():
    x = torch.empty(2, 64, dtype=torch.bfloat16, device="meta")
    with tiles.recording("sm_90"):
        keys = ("16-64-narrow", "16-64")
        table = tiles.table("sm_90")["attention_fwd"]
        assert tiles.choose("attention_fwd", x, *keys) == table["16-64-narrow"]
        assert tiles.choose("attention_fwd", x, "unknown", "16-64") == table["16-64"]
        assert tiles.choose("rotary", x, "unknown") == tiles.table("sm_90")["rotary"]["*"]
        with pytest.raises(StopIteration):
            tiles.choose("attention_fwd", x, "unknown")


def test_overriding_one_entry_and_no_other():
    x = torch.empty(2, 64, dtype=torch.bfloat16, device="meta")
    before = tiles.choose("attention_fwd", x, "16-64")
    with tiles.overriding("attention_fwd", "16-64", before | {"num_warps": 2}):
        taken = tiles.choose("attention_fwd", x, "16-64")
        assert taken["num_warps"] == 2
        taken["num_warps"] = 99  # a dict of the caller's own
        assert tiles.choose("attention_fwd", x, "16-64")["num_warps"] == 2
        assert tiles.choose("attention_bwd_q", x, "16-64")["num_warps"] != 2
    assert tiles.choose("attention_fwd", x, "16-64") == before


@pytest.mark.parametrize("family", ALL)
def test_tables_are_committed_as_the_tuner_writes_them(family):
    tune = pytest.importorskip("tune")
    assert tune.dumps(tiles.table(family)) == (tiles.FOLDER / f"{family}.json").read_text()


def test_neighbours_are_one_step_away():
    tune = pytest.importorskip("tune")
    found = list(tune.neighbours({"BLOCK_M": 16, "num_warps": 8, "num_stages": 1}))
    assert found == [
        {"BLOCK_M": 32, "num_warps": 8, "num_stages": 1},
        {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 16, "num_warps": 16, "num_stages": 1},
        {"BLOCK_M": 16, "num_warps": 8, "num_stages": 2},
    ]


def test_the_walk_takes_what_is_faster_and_right(monkeypatch):
    """Times stand in for a card's: less for fewer warps, but two give wrong results."""
    tune = pytest.importorskip("tune")
    search = object.__new__(tune.Search)
    search.place = tune.Place(dry=True)
    monkeypatch.setattr(search, "seconds", lambda k, key, t: float(t["num_warps"]), raising=False)
    monkeypatch.setattr(search, "right", lambda k, key, t: t["num_warps"] != 2, raising=False)
    start = {"num_warps": 16}
    assert search.walk("rotary", "*", start, float("inf")) == {"num_warps": 4}
    assert search.walk("rotary", "*", start, 0.0) == start  # no time
