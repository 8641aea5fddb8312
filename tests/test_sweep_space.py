"""What a study varies: how fields and values are written, and what is refused."""

import pytest

from inarch.core.errors import ConfigError
from inarch.methods import read_config
from inarch.sweep.space import Range, Space
from inarch.sweep.study import StudyConfig, read_study_file, ready_studies
from inarch.train.recipe import Recipe


def space(base="seq_bn", /, **vary):
    return Space.of({name.replace("__", "."): value for name, value in vary.items()}, read_config(base), Recipe())


def values(made):
    (dimension,) = made.dimensions
    return dimension.values


@pytest.mark.parametrize(
    ("field", "text", "expected"),
    [
        ("reduction_factor", "4, 16,64", (4, 16, 64)),
        ("reduction_factor", [4, 16.0, 4], (4, 16.0)),
        ("original_ln_before", "", (True, False)),
        ("original_ln_before", "true,false", (True, False)),
        ("schedule", "", ("cosine", "linear", "constant")),
        ("residual_before_ln", "true,post_add", (True, "post_add")),
        ("leave_out", "[],[0,1]", ((), (0, 1))),
        ("learning_rate", "none,0.01", (None, 0.01)),
        ("learning_rate", "1e-4..1e-2:log", Range(1e-4, 1e-2, log=True, is_int=False)),
        ("learning_rate", "1e-4..1e-2:log:3", (1e-4, 1e-3, 1e-2)),
        ("dropout", "0..0.5", Range(0, 0.5, log=False, is_int=False)),
        ("batch_size", "8..32", Range(8, 32, log=False, is_int=True)),
        ("batch_size", "8..32:4", (8, 16, 24, 32)),
        ("adapter", "lora[r=4],seq_bn|lora", ("lora[r=4]", "seq_bn|lora")),
    ],
)
def test_values_are_read_as_the_field_takes_them(field, text, expected):
    assert values(space(**{field: text})) == expected


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({}, "A study varies at least one field; got none"),
        (
            {"reduction_fctor": "4"},
            r"or of the adapter; got `reduction_fctor`.*Did you mean `reduction_factor`",
        ),
        ({"rank": "4"}, "got `rank` with `seq_bn`"),
        ({"reduction_factor": "4,-1"}, "`BottleneckConfig.reduction_factor` must be more than 0; got -1"),
        ({"schedule": "cosine,steep"}, "`Recipe.schedule` must be `cosine` or `linear` or `constant`; got 'steep'"),
        ({"reduction_factor": ""}, "A field without values is varied over all it has; got `reduction_factor`"),
        ({"residual_before_ln": ""}, "A field without values is varied over all it has"),
        ({"learning_rate": "1e-2..1e-4"}, "A range goes from a number to a larger one"),
        ({"learning_rate": "a..b"}, "A range goes from a number to a larger one"),
        ({"learning_rate": "0..1:log"}, "A range in the logarithm begins above 0"),
        ({"learning_rate": "-1..1"}, "`Recipe.learning_rate` must be more than 0; got -1"),
        ({"learning_rate": "1e-4..1e-2:1"}, "A range has at least 2 points"),
        ({"non_linearity": "1..2"}, "A range is for a field that holds numbers; got `1..2` for `non_linearity`"),
        ({"reduction_factor": 4}, "varied over a list of values or the text of a range; got 4"),
        ({"seed": "0,1"}, "`seed` is not varied.*repeats its trials with `seeds`"),
        ({"stop_early": ""}, "`stop_early` is not varied.*when a trial is given up"),
        ({"workers": "0,1"}, "`workers` is not varied.*changes no result"),
        ({"adapter": "seq_bnn,lora"}, "Did you mean `seq_bn`"),
        ({"adapter": ""}, "a configuration begins with a name"),
        ({"adapter": 3}, "`adapter` is varied over configurations; got 3"),
        ({"lora.dropout": "0"}, "got `lora.dropout` with `seq_bn`"),
    ],
)
def test_what_cannot_be_varied_is_refused(vary, message):
    with pytest.raises(ConfigError, match=message):
        Space.of(vary, read_config("seq_bn"), Recipe())


def test_every_problem_is_told_at_once():
    with pytest.raises(ConfigError, match=r"2 problems(.|\n)*`lernrate`(.|\n)*got 'steep'"):
        space(lernrate="1", schedule="steep")


def test_a_grid_has_every_combination_once_and_leaves_out_what_an_adapter_does_not_have():
    made = space(adapter="seq_bn,lora", reduction_factor="4,16", r="2,8", learning_rate="1e-3,1e-2")
    grid = made.grid()
    assert len(grid) == (2 + 2) * 2
    assert {tuple(one) for one in grid} == {
        ("adapter", "reduction_factor", "learning_rate"),
        ("adapter", "r", "learning_rate"),
    }
    config, recipe = made.configure({"adapter": "lora", "r": 2, "learning_rate": 0.01})
    assert (str(config), recipe.learning_rate) == ("lora[r=2]", 0.01)


def test_a_field_of_two_methods_changes_both_or_the_one_that_is_named():
    both = space("seq_bn|lora", dropout="0.1")
    assert [part.dropout for part in both.configure({"dropout": 0.1})[0].parts] == [0.1, 0.1]
    one = space("seq_bn|lora", lora__dropout="0.1")
    assert [part.dropout for part in one.configure({"lora.dropout": 0.1})[0].parts] == [0.0, 0.1]


def test_a_grid_says_how_a_range_gets_points():
    with pytest.raises(ConfigError, match=r"Say how many, as in `learning_rate=0.0001..0.01:5`"):
        space(learning_rate="1e-4..1e-2:log").grid()


def test_a_sampler_needs_a_number_of_trials_and_a_grid_takes_none():
    with pytest.raises(ConfigError, match=r"`StudyConfig.trials`.*got none for the sampler `tpe`. Give a number"):
        StudyConfig(vary={"r": "1,2"}, sampler="tpe")
    with pytest.raises(ConfigError, match=r"got 3 for the sampler `grid`. Leave it out"):
        StudyConfig(vary={"r": "1,2"}, trials=3)


@pytest.mark.parametrize("name", ready_studies())
def test_a_ready_study_can_be_read(name):
    parts = read_study_file(name)
    study = StudyConfig.from_dict(parts["study"])
    recipe = Recipe.from_dict(parts["recipe"])
    assert len(Space.of(study.vary, read_config(study.adapter), recipe).grid()) > 1


def test_the_norm_flags_are_all_eight_with_three_seeds_trained_to_the_end():
    study = StudyConfig.from_dict(read_study_file("norm-flags")["study"])
    assert len(Space.of(study.vary, read_config(study.adapter), Recipe()).grid()) == 8
    assert (study.seeds, study.pruner, study.allow_unsound, study.reuse) == (3, "none", True, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "A study file must be readable JSON"),
        ("{}", "A study file has the form"),
        ('{"study": {}, "recipes": {}}', "got `recipes` in .*Did you mean `recipe`"),
    ],
)
def test_a_file_that_is_no_study_is_refused(tmp_path, text, message):
    path = tmp_path / "study.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_study_file(path)


def test_an_unknown_study_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"got `norm-flag`. Did you mean `norm-flags`"):
        read_study_file("norm-flag")
