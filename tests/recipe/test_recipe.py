"""Recipes: presets, files, dicts and overrides; what is wrong with one is said by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moebit.errors import BadInputError
from moebit.recipe import BIT_WIDTHS, GROUP_SIZES, Recipe, load_recipe, parse_override, presets

FP8 = {"type": "fp8", "bits": 8, "group_size": -1}
KINDS, PRESET_BITS = ("rtn", "gptq", "minmax"), (2, 3, 4, 8)


# --- presets


def test_every_preset_is_there_and_loads() -> None:
    assert set(presets()) >= {f"{kind}-w{bits}" for kind in KINDS for bits in PRESET_BITS}
    for name, text in presets().items():
        recipe = load_recipe(name)
        given = yaml.safe_load(text)
        assert given["version"] == 1, name
        for section, values in recipe.model_dump().items():  # nothing that the file says is lost on the way
            if isinstance(values, dict):
                assert {key: given[section][key] for key in given.get(section, {}) if key in values}.items() <= values.items(), name


@pytest.mark.parametrize("bits", PRESET_BITS)
def test_presets_compare_rounding_alone(bits: int) -> None:
    """rtn and gptq of one width share grid, group size and clipping search; minmax is rtn without the search."""
    rtn, gptq, minmax = (load_recipe(f"{kind}-w{bits}") for kind in KINDS)
    assert rtn.weights == gptq.weights == minmax.weights
    assert (rtn.weights.bits, rtn.weights.group_size, rtn.weights.symmetric, rtn.weights.scope) == (bits, 128, True, "all")
    assert (rtn.solver.method, gptq.solver.method, minmax.solver.method) == ("rtn", "gptq", "rtn")
    assert (rtn.solver.clip_search, gptq.solver.clip_search, minmax.solver.clip_search) == (True, True, False)
    assert (gptq.solver.scales, gptq.solver.act_order, gptq.solver.damping, gptq.solver.affinity_power) == ("static", True, 0.01, 0)
    assert gptq.needs_calibration
    assert not rtn.needs_calibration


@pytest.mark.parametrize("name", presets())
def test_the_first_line_of_a_preset_tells_what_it_is(name: str) -> None:
    """`moebit recipes` lists it: one sentence that ends where the line ends."""
    first = presets()[name].splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_presets_of_moequant_differ_from_their_baselines_in_the_method_alone(bits: int) -> None:
    for suffix, group in (("", -1), ("-g128", 128)):
        moequant, quarot = load_recipe(f"moequant-w{bits}{suffix}"), load_recipe(f"quarot-gptq-w{bits}{suffix}")
        gptq = load_recipe(f"gptq-w{bits}", {"weights.group_size": group})
        assert (moequant.rotation.absorbed, moequant.solver.affinity_power) == ("r1", 1)
        assert (moequant.calibration.kind, moequant.calibration.scope, moequant.calibration.width) == ("ebss", "sequence", 4)
        assert load_recipe(moequant.model_copy(update={"calibration": quarot.calibration}), {"solver.affinity_power": 0}) == quarot
        assert load_recipe(quarot, {"rotation.absorbed": "none"}) == gptq
        awq = load_recipe(f"moequant-awq-w{bits}{suffix}")
        assert (awq.solver.method, awq.solver.affinity_power, awq.weights.group_size) == ("awq", 1, group)
    plain = load_recipe(f"awq-w{bits}")
    assert load_recipe(awq.model_copy(update={"calibration": plain.calibration}), {"solver.affinity_power": 0}) == plain


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_our_own_presets_are_gptq_with_the_options_that_won(bits: int) -> None:
    """One combination for all widths; on text that is given, or on what the model writes."""
    best, gptq = load_recipe("best-w2-fast" if bits == 2 else f"best-w{bits}"), load_recipe(f"gptq-w{bits}")
    off = {"weights.signed": False, "solver.output_aware": False, "solver.refit": False, "solver.drift": "none", "calibration.kind": "text"}
    assert load_recipe(best, off) == gptq
    for name, section in best.model_dump().items():
        if isinstance(section, dict) and name not in ("weights", "solver", "calibration"):
            assert section == gptq.model_dump()[name]
    assert (best.weights.signed, best.solver.output_aware, best.solver.refit, best.solver.drift) == (True, True, True, "ridge")
    assert best.calibration.kind == "self"


@pytest.mark.parametrize(("name", "bits", "target"), [("4bit", 4, 4.125), ("3bit", 3, 3.125), ("2.5bit", 3, 2.5)])
def test_best_presets_at_a_size_hand_its_bits_out_by_solved_prices(name: str, bits: int, target: float) -> None:
    """On text, a data set each: prices are measured on it before the model could write its own."""
    best, alike = load_recipe(f"best-{name}"), load_recipe(f"best-w{bits}", {"calibration.kind": "text"})
    chosen = best.allocation
    assert (chosen.kind, chosen.target_bits, chosen.granularity, chosen.solver) == ("knapsack", target, "projection", "gptq")
    assert load_recipe(best, {"allocation": {}}) == alike


def test_at_two_bits_rounding_is_learned_too() -> None:
    best = load_recipe("best-w2")
    assert best.refine.active
    assert load_recipe(best, {"refine.kind": "none", "refine.steps": 300, "refine.rate": "auto"}) == load_recipe("best-w2-fast")


@pytest.mark.parametrize(("weights", "activations"), [(4, 4), (3, 4), (3, 3), (2, 4), (8, 8)])
def test_presets_of_eaquant_are_duquant_and_the_expert_aware_parts(weights: int, activations: int) -> None:
    eaquant = load_recipe(f"eaquant-w{weights}a{activations}")
    assert (eaquant.weights.bits, eaquant.activations.bits, eaquant.activations.qkv_bits) == (weights, activations, activations)
    assert (eaquant.smoothing.kind, eaquant.smoothing.aggregate, eaquant.router.bits, eaquant.router.align) == (
        "expert_aware",
        "max",
        8,
        "kl",
    )
    assert (eaquant.calibration.balance, eaquant.router.realign) == (2, "none")
    duquant = load_recipe("duquant-w4a4")
    assert duquant.smoothing.kind == "expert_aware"
    assert duquant.smoothing.aggregate == "none"
    assert duquant.smoothing.alpha == eaquant.smoothing.alpha
    off = {"smoothing": duquant.smoothing.model_dump(), "router": {}, "calibration.balance": "none", "weights.bits": 4}
    off |= {"activations.bits": 4, "activations.qkv_bits": 4, "activations.clip": 0.9}
    assert load_recipe(eaquant, off) == duquant
    assert load_recipe("smoothquant-w4a4", {"smoothing": {}}) == load_recipe("rtn-w4a4")


def test_the_default_is_gptq_w4() -> None:
    assert load_recipe(None) == load_recipe("gptq-w4")


# --- the same recipe, written differently


def test_file_dict_and_recipe_are_alike(tmp_path: Path) -> None:
    data = {"version": 1, "weights": {"bits": 3, "ignore": ["*.q_proj"]}, "solver": {"method": "rtn"}}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(data))
    from_dict = load_recipe(data)
    assert load_recipe(file) == load_recipe(str(file)) == load_recipe(from_dict) == from_dict
    assert (from_dict.weights.bits, from_dict.weights.group_size, from_dict.weights.ignore) == (3, 128, ["*.q_proj"])


def test_yaml_round_trip() -> None:
    recipe = load_recipe({"weights": {"bits": 2, "symmetric": False, "ignore": ["a", "b"]}, "calibration": {"samples": 3}})
    assert load_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    """Independent of the order of keys and of what is left to its default, different for every difference."""
    one = load_recipe({"weights": {"bits": 4, "group_size": 64}, "solver": {"method": "rtn"}})
    file = tmp_path / "r.yaml"
    file.write_text("solver:\n  method: rtn   # nearest\nweights: {group_size: 64, symmetric: true}\n")
    assert load_recipe(file).digest() == one.digest()
    assert one.digest() == hashlib.sha256(json.dumps(one.model_dump(), sort_keys=True).encode()).hexdigest()
    others = [load_recipe(one, {path: value}) for path, value in {"weights.bits": 3, "solver.damping": 0.02, "format": "dense"}.items()]
    assert len({recipe.digest() for recipe in (one, *others)}) == 4


def test_overrides() -> None:
    recipe = load_recipe("rtn-w4", {"weights.bits": 3, "weights.ignore": ["*.k_proj"], "format": "dense"})
    assert (recipe.weights.bits, recipe.weights.ignore, recipe.format) == (3, ["*.k_proj"], "dense")
    assert load_recipe({}, {"calibration.samples": 7}).calibration.samples == 7  # a section that the dict lacks
    assert load_recipe("rtn-w4").weights.bits == 4  # presets do not remember


def test_a_given_dict_is_left_alone() -> None:
    data: dict[str, Any] = {"weights": {"bits": 4}, "smoothing": {"kind": "none"}, "calibration": {"balance": "none"}}
    load_recipe(data, {"weights.bits": 3})
    assert data == {"weights": {"bits": 4}, "smoothing": {"kind": "none"}, "calibration": {"balance": "none"}}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("weights.bits=3", ("weights.bits", 3)),
        ("solver.damping=1e-1", ("solver.damping", 0.1)),
        ("weights.symmetric=false", ("weights.symmetric", False)),
        ("weights.ignore=['*.a', '*.b']", ("weights.ignore", ["*.a", "*.b"])),
        ("format=dense", ("format", "dense")),
        ("weights.ignore=[a=b]", ("weights.ignore", ["a=b"])),
    ],
)
def test_override_syntax(text: str, wanted: tuple[str, Any]) -> None:
    path, value = parse_override(text)
    assert load_recipe({}, {path: value}) == load_recipe({}, {wanted[0]: wanted[1]})


@pytest.mark.parametrize("text", ["weights.bits", "=3", ""])
def test_override_without_a_value(text: str) -> None:
    with pytest.raises(BadInputError, match=r"key\.path=value"):
        parse_override(text)


@pytest.mark.parametrize("text", ["weights.ignore=[", "weights.bits={3", "weights.ignore=*"])
def test_override_that_is_no_yaml(text: str) -> None:
    with pytest.raises(BadInputError, match="weights"):
        parse_override(text)


def test_override_into_a_value() -> None:
    with pytest.raises(BadInputError, match=r"format\.name.*'format' is a value"):
        load_recipe({"format": "native"}, {"format.name": 1})


# --- what is wrong is said by name


@pytest.mark.parametrize(
    ("data", "unknown", "nearest"),
    [
        ({"wieghts": {"bits": 4}}, "wieghts", "weights"),
        ({"weights": {"bit": 4}}, "weights.bit", "bits"),
        ({"weights": {"groupsize": 64}}, "weights.groupsize", "group_size"),
        ({"solver": {"act_ordr": True}}, "solver.act_ordr", "act_order"),
        ({"calibration": {"seqlen": 64}}, "calibration.seqlen", "seq_len"),
        ({"smoothing": {"kidn": "none"}}, "smoothing.kidn", "kind"),
        ({"activations": {"bitss": 16}}, "activations.bitss", "bits"),
        ({"allocation": {"knd": "uniform"}}, "allocation.knd", "kind"),
    ],
)
def test_unknown_keys(data: dict[str, Any], unknown: str, nearest: str) -> None:
    with pytest.raises(BadInputError) as error:
        load_recipe(data)
    assert f"{unknown}: unknown key" in str(error.value)
    assert f"'{nearest}'" in str(error.value)


def test_unknown_keys_without_a_near_one_list_the_known() -> None:
    with pytest.raises(BadInputError, match=r"weights\.zzzz: unknown key.*bits.*group_size"):
        load_recipe({"weights": {"zzzz": 1}})


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(BadInputError) as error:
        load_recipe({"weights": {"bitz": 4, "group_size": 100}, "solver": {"damping": -1}})
    assert all(part in str(error.value) for part in ("weights.bitz", "weights.group_size", "solver.damping"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"weights": {"bits": 7}}, "2, 3, 4, 5, 6, 8"),
        ({"weights": {"bits": 1}}, "2, 3, 4, 5, 6, 8"),
        ({"weights": {"bits": "many"}}, r"weights\.bits"),
        ({"weights": {"group_size": 48}}, "-1, 32, 64, 128"),
        ({"weights": {"scope": "attention"}}, r"weights\.scope.*experts.*all"),
        ({"weights": {"signed": True, "symmetric": False}}, "symmetric"),
        ({"weights": {"ignore": "*.q_proj"}}, r"weights\.ignore"),
        ({"weights": 4}, "weights"),
        ({"solver": {"method": "magic"}}, r"solver\.method.*rtn.*gptq"),
        ({"solver": {"scales": "dynamic"}}, "act_order: false"),
        ({"solver": {"damping": 2}}, r"solver\.damping"),
        ({"calibration": {"samples": 0}}, r"calibration\.samples"),
        ({"version": 2}, "version"),
        ({"format": "exl2"}, "format.*native.*compressed-tensors.*dense.*gguf"),
        ({"activations": {"bits": 2}}, r"activations\.bits: 2 bits.*3, 4, 5, 6, 7, 8, 16"),
        ({"activations": {"qkv_bits": 9}}, r"activations\.qkv_bits: 9 bits.*3, 4"),
        ({"activations": {"clip": 0}}, r"activations\.clip"),
        ({"activations": {"clip": 1.1}}, r"activations\.clip"),
        ({"activations": {"bits": 8}, "format": "dense"}, r"activations\.bits: 8.*dense.*compressed-tensors"),
        ({"activations": {"qkv_bits": 4}, "format": "dense"}, "dense has no place"),
        ({"activations": {"bits": 4}, "format": "compressed-tensors"}, "4 bits.*format: native"),
        ({"activations": {"bits": 8, "symmetric": True, "clip": 0.9}, "format": "compressed-tensors"}, r"clip 0\.9.*format: native"),
        ({"activations": {"bits": 8, "symmetric": True, "qkv_bits": 8}, "format": "compressed-tensors"}, "query, key and value 8"),
        ({"rotation": {"online": "hadamard"}, "format": "compressed-tensors"}, r"rotation\.online: hadamard.*format: native"),
        ({"rotation": {"online": "magic"}}, r"rotation\.online.*hadamard.*duquant"),
        ({"rotation": {"down": "all"}}, r"rotation\.down.*shared.*expert"),
        ({"activations": {"bits": 8}, "format": "compressed-tensors"}, r"activations\.symmetric: true"),
        ({"activations": {"bits": 8, "symmetric": True}, "format": "compressed-tensors"}, r"weights\.bits: 8.*weights\.group_size: -1"),
        ({"allocation": {"kind": "fuzzy"}}, r"allocation: kind: fuzzy needs target_bits"),
        ({"allocation": {"target_bits": 3}}, r"allocation: kind: uniform takes its width from weights\.bits"),
        ({"allocation": {"kind": "magic"}}, r"allocation\.kind.*fuzzy.*knapsack"),
        ({"allocation": {"kind": "fuzzy", "target_bits": 3, "ladder": [2, 7]}}, r"allocation\.ladder.*2, 3, 4, 5, 6, 8"),
        ({"allocation": {"kind": "fuzzy", "target_bits": 3, "granularity": "layer"}}, "kind: knapsack"),
        ({"switching": {"share": -0.1}}, r"switching\.share"),
        ({"switching": {"share": 0.01}, "format": "dense"}, "switching: format dense.*format: native"),
        ({"weights": {"type": "fp8"}}, r"weights: type: fp8.*group_size: -1"),
        ({"weights": FP8}, r"weights\.type: fp8.*solver\.method: rtn"),
        ({"weights": FP8, "solver": {"method": "rtn"}}, r"weights\.type: fp8.*activations\.bits: 8"),
        (
            {"weights": FP8, "solver": {"method": "rtn"}, "activations": {"bits": 8, "symmetric": True}},
            r"weights\.type: fp8.*native.*format: compressed-tensors",
        ),
    ],
)
def test_values_that_cannot_be(data: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInputError, match=says):
        load_recipe(data)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_values_that_can(bits: int, group_size: int) -> None:
    recipe = load_recipe({"weights": {"bits": bits, "group_size": group_size}, "solver": {"scales": "dynamic", "act_order": False}})
    assert (recipe.weights.bits, recipe.weights.group_size, recipe.solver.scales) == (bits, group_size, "dynamic")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"router": {"bits": 2}}, r"router.bits: 2 bits: choose 3 to 8"),
        ({"router": {"align": "kl"}}, r"router: align: kl .*set bits: 8"),
        ({"router": {"bits": 8, "align": "kl", "top_share": 1.5}}, r"router.top_share"),
        ({"router": {"aling": "kl"}}, r"router.aling: unknown key; did you mean 'align'"),
        ({"calibration": {"balance": 0}}, r"calibration.balance: 0: a positive ratio"),
        ({"calibration": {"balance": "much"}}, r"calibration.balance: 'much'"),
        ({"calibration": {"balance": True}}, r"calibration.balance: True"),
        ({"smoothing": {"alpha": 1.5}}, r"smoothing.alpha"),
        ({"smoothing": {"kind": "awq"}}, r"smoothing.kind"),
        ({"calibration": {"balance": 2}, "solver": {"method": "rtn"}}, r"calibration.balance: .*set solver.method: gptq"),
    ],
)
def test_routers_and_balance_that_cannot_be(data: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInputError, match=says):
        load_recipe(data)


def test_what_looks_at_tokens_needs_them() -> None:
    for router in ({"realign": "ridge"}, {"bits": 8, "align": "kl"}):
        recipe = load_recipe({"router": router, "solver": {"method": "rtn"}})
        assert recipe.needs_calibration
        assert not recipe.needs_hessians
    assert not load_recipe({"router": {"bits": 8}, "solver": {"method": "rtn"}}).needs_calibration
    assert load_recipe({"calibration": {"balance": 2}}).calibration.balance == 2.0


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
def test_rounded_activations(bits: int) -> None:
    given = {"bits": bits, "symmetric": bits % 2 == 0, "clip": 0.9, "qkv_bits": bits}
    assert load_recipe({"activations": given}).activations.model_dump() == given


@pytest.mark.parametrize("online", ["none", "hadamard", "duquant"])
def test_what_needs_text(online: str) -> None:
    """Hadamard rotations are drawn, DuQuant's are found on tokens."""
    rtn = load_recipe({"solver": {"method": "rtn"}, "rotation": {"online": online, "absorbed": "none"}})
    assert rtn.rotation.online == online
    assert (rtn.needs_calibration, rtn.needs_hessians) == (online == "duquant", False)
    assert load_recipe({"rotation": {"online": online}}).needs_hessians


def test_presets_with_rounded_activations_differ_in_smoothing_and_rotation_alone() -> None:
    names = ("rtn", "hadamard", "smoothquant", "duquant")
    recipes = {name: load_recipe(f"{name}-w4a4") for name in names}
    found = {name: (recipe.smoothing.kind, recipe.rotation.online) for name, recipe in recipes.items()}
    expected = [("none", "none"), ("none", "hadamard"), ("smoothquant", "none"), ("expert_aware", "duquant")]
    assert found == dict(zip(names, expected, strict=True))
    first = recipes["rtn"]
    off = {"rotation.online": "none", "smoothing.kind": "none", "smoothing.aggregate": first.smoothing.aggregate}
    assert all(load_recipe(recipe, off) == first for recipe in recipes.values())
    assert (first.weights.bits, first.weights.group_size, first.weights.symmetric, first.solver.clip_search) == (4, -1, False, True)
    assert first.activations.model_dump() == {"bits": 4, "symmetric": False, "clip": 0.9, "qkv_bits": 4}


# --- the parts of the recipe language that this version lacks


def test_what_is_switched_off_is_accepted() -> None:
    off = {
        "activations": {"bits": 16, "symmetric": False, "clip": 1.0, "qkv_bits": 16},
        "router": {"bits": 16, "align": "none", "realign": "none"},
        "smoothing": {"kind": "none", "alpha": 0.6, "aggregate": "max"},
        "rotation": {"absorbed": "none", "online": "none"},
        "calibration": {"kind": "text", "balance": "none"},
        "allocation": {"kind": "uniform"},
        "switching": {"share": 0.0},
    }
    assert load_recipe(off) == load_recipe({}) == Recipe()


@pytest.mark.parametrize("section", [{"affinity_power": 1}, {"method": "rtn"}])
def test_output_aware_stands_by_itself(section: dict[str, Any]) -> None:
    assert load_recipe({"solver": {"output_aware": True}}).solver.output_aware
    with pytest.raises(BadInputError, match="output_aware"):
        load_recipe({"solver": {"output_aware": True, **section}})


OFF = {"solver.refit": False, "solver.drift": "none", "calibration.coverage": "layer"}


def test_what_came_later_is_said_only_where_it_is_on() -> None:
    """A recipe without it keeps the text and the digest that it had."""
    plain = load_recipe("gptq-w3")
    assert load_recipe("gptq-w3", OFF).digest() == plain.digest()
    assert not [key for key in OFF if key.split(".")[1] in plain.to_yaml()]
    for key, value in {"solver.refit": True, "solver.drift": "ridge", "calibration.coverage": "soft"}.items():
        recipe = load_recipe("gptq-w3", {key: value})
        assert recipe.digest() != plain.digest()
        assert load_recipe(yaml.safe_load(recipe.to_yaml())) == load_recipe(recipe) == recipe


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"solver": {"refit": True, "method": "rtn"}}, "refit: true .*set method: gptq"),
        ({"solver": {"refit": True, "method": "awq"}}, "refit: true .*set method: gptq"),
        ({"solver": {"drift": "ridge", "method": "awq"}}, "drift: ridge .*set method: gptq"),
        ({"calibration": {"coverage": "soft"}, "solver": {"method": "rtn"}}, "coverage: soft .*set solver.method: gptq"),
        ({"calibration": {"coverage": "sofd"}}, "calibration.coverage"),
    ],
)
def test_options_that_cannot_be(data: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInputError, match=says):
        load_recipe(data)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"kind": "text", "scope": "sequence"}, "scope is of no use with kind: text"),
        ({"kind": "text", "text_share": 0.5}, "text_share is of no use with kind: text"),
        ({"kind": "self", "width": 8}, "set kind to one of ebss"),
        ({"kind": "ebss", "oversample": 2}, "set kind to one of self-balanced"),
        ({"kind": "ebbs"}, "'ebss'"),
        ({"kind": "ebss", "temperature": 0}, "calibration.temperature"),
        ({"kind": "self", "text_share": 1}, "calibration.text_share"),
    ],
)
def test_options_of_sampling_belong_to_their_kind(section: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInputError) as error:
        load_recipe({"calibration": section})
    assert says in str(error.value)


@pytest.mark.parametrize("section", ["router", "smoothing", "switching"])
def test_sections_that_are_no_sections(section: str) -> None:
    with pytest.raises(BadInputError, match=section):
        load_recipe({section: 4})


# --- files


def test_unknown_presets_name_the_nearest() -> None:
    with pytest.raises(BadInputError, match=r"'gptq-w44'.*did you mean 'gptq-w4'"):
        load_recipe("gptq-w44")
    for name in ("zzz", "", "no/such/file.yaml", "x" * 5000):
        with pytest.raises(BadInputError) as error:
            load_recipe(name)
        said = str(error.value)
        assert sum(f"'{known}'" in said for known in presets()) in (0, 3), "the three nearest, or why the file cannot be read"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize(
    "key",
    [
        "solver.damping", "solver.affinity_power", "activations.clip", "smoothing.alpha", "router.kl_weight", "router.top_share",
        "calibration.temperature", "calibration.repetition_penalty", "calibration.balance", "allocation.target_bits", "switching.share",
    ],
)  # fmt: skip
def test_numbers_that_are_none_are_refused(key: str, number: float) -> None:
    kind = {"calibration.kind": "self"} if key in ("calibration.temperature", "calibration.repetition_penalty") else {}
    with pytest.raises(BadInputError, match=key):
        load_recipe("gptq-w4", {**kind, key: number})


def test_a_dict_that_is_no_data_is_refused() -> None:
    with pytest.raises(BadInputError, match="plain values"):
        load_recipe({"weights": {"ignore": {"a", "b"}}})


@pytest.mark.parametrize(("text", "says"), [("weights: [", "not valid YAML"), ("- bits", "list"), ("bits", "str"), ("", "mapping")])
def test_files_that_are_no_recipes(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(BadInputError, match=says) as error:
        load_recipe(file)
    assert str(file) in str(error.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"weights: \xff\xfe")
    with pytest.raises(BadInputError) as error:
        load_recipe(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    "other",
    [
        {"activations": {"bits": 8}},
        {"rotation": {"absorbed": "r1"}},
        {"rotation": {"online": "hadamard"}},
        {"smoothing": {"kind": "smoothquant"}},
        {"solver": {"method": "awq"}},
    ],
)
def test_channels_apart_want_weights_and_inputs_as_they_are(other: dict[str, Any]) -> None:
    assert load_recipe({"switching": {"share": 0.01}}).switching.share == 0.01
    with pytest.raises(BadInputError, match="switching: channels apart"):
        load_recipe({"switching": {"share": 0.01}, **other})


def test_unknown_keys_inside_lists() -> None:
    with pytest.raises(BadInputError, match=r"weights\.overrides\.0\.\w+: unknown key"):
        load_recipe("rtn-w4", {"weights.overrides": [{"match": "*self_attn*", "type": "q4_k", "kind": 8}]})
