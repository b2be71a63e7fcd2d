"""A recipe says everything that decides a bundle; what it does not know, it refuses by name."""

import pytest

from probes.building.recipe import BuildRecipe, Source, read_recipe, recipe_names
from safe_decode.errors import ConfigurationError


def written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_read(name):
    recipe = read_recipe(name)
    assert recipe.about and recipe.sources
    uses = {use for source in recipe.sources for use in source.use}
    assert uses == {"labelled", "prompts"}, "it neither fits nor certifies"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sources: []", "sources=[]"),
        ("sources: [{data: a, use: [fit]}]", "'labelled' or 'prompts'"),
        ("sources: [{data: a}]\nanswers: {bening: 3}", "answers.bening=3"),
        ("sources: [{data: a}]\nanswers: {benign: -1}", "answers.benign=-1"),
        ("sources: [{data: a}]\nalphas: [0.9]", "alphas.0=0.9"),
        ("sources: [{data: a}]\nalphas: [0.1, 0.1]", "each rate is wanted once"),
        ("sources: [{data: a}]\ndelta: 0.5", "delta=0.5"),
        ("sources: [{data: a}]\nrefusal: ' '", "refusal=' '"),
        ("- 1", "the file"),
        ("{", "is not YAML"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_holds(tmp_path, text, said):
    with pytest.raises(ConfigurationError) as raised:
        read_recipe(written(tmp_path, text))
    assert said in str(raised.value)


def test_a_recipe_that_is_not_there_is_told_with_those_that_are(tmp_path):
    with pytest.raises(ConfigurationError, match="pass a YAML file, or one of .*public"):
        read_recipe(tmp_path / "none.yaml")


def test_defaults_are_those_of_the_fields(tmp_path):
    assert read_recipe(written(tmp_path, "sources: [{data: a.jsonl}]")) == BuildRecipe(
        sources=(Source(data="a.jsonl"),)
    )
