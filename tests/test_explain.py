"""`xviz-jax explain`, on tiny models."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from jax.ad_checkpoint import checkpoint_name
from PIL import Image
from rich.console import Console

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax import cli
from xviz_jax.explain import Request, methods, show
from xviz_jax.explain import run as explain
from xviz_jax.explain.subject import Subject, of_checkpoint
from xviz_jax.explain.target import choose
from xviz_jax.models import TextProcessor

GOLDENS = Path(__file__).parent / "models" / "goldens"
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
WORDS += ["the", "film", "was", "not", "good", "[red]", "$x^$", "."]
TEXT = "the film was not good ."
PNG = b"\x89PNG"


def tokenizer(special=True):
    words = {word: index for index, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if special:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
    made.add_special_tokens(WORDS[:4])
    return made


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of a golden model, with a tokenizer."""

    def make(name):
        out = Path(shutil.copytree(GOLDENS / "text" / name, tmp_path / name))
        tokenizer(name.startswith("bert")).save(str(out / "tokenizer.json"))
        return out

    return make


def run(capsys, *arguments):
    """The exit code, and what was printed on either side."""
    code = cli.main(["explain", *map(str, arguments)])
    said = capsys.readouterr()
    return code, " ".join(said.out.split()), said.err


def linear(x):
    """A function that the command line imports by name."""
    return jnp.stack([jnp.sum(x), jnp.vdot(x, jnp.arange(6.0).reshape(2, 3))])


def test_a_text_in_the_terminal_and_as_a_picture(folder, tmp_path, capsys):
    out = tmp_path / "why.png"
    arguments = ["--text", TEXT, "--method", "saliency", "--out", out]
    code, said, _ = run(capsys, "--model", folder("gpt2_sequence"), *arguments)
    assert code == 0
    assert said.startswith("predicted: LABEL_")
    assert "saliency: LABEL_" in said
    assert TEXT in said
    assert out.read_bytes().startswith(PNG)


def test_a_word_and_not_another(folder, capsys):
    model = folder("gpt2_lm")
    arguments = ["--text", TEXT, "--method", "attention_rollout"]
    wanted = ["--target", "good", "--versus", "film"]
    code, said, _ = run(capsys, "--model", model, *arguments, *wanted)
    assert code == 0
    assert "'good' and not 'film'" in said
    assert "mass: 1" in said


def test_what_is_explained_of_a_checkpoint(folder):
    model = folder("bert_masked")
    subject = of_checkpoint(model, "the film was [MASK] .", None, None)
    assert subject.query == 4
    assert subject.find is not None
    assert subject.find("good") == 9
    assert subject.name(9) == "'good'"
    assert subject.baseline is not None
    assert subject.baseline.tolist() == [1, 0, 0, 0, 0, 0, 2]
    with pytest.raises(ValueError, match="no masked token; pass `--position`"):
        of_checkpoint(model, TEXT, None, None)
    labelled = of_checkpoint(folder("bert_sequence"), TEXT, None, None)
    assert labelled.find is not None
    assert labelled.find("LABEL_2") == 2
    with pytest.raises(ValueError, match=r"one of \('LABEL_0', .*got 'cat'"):
        labelled.find("cat")
    pair = of_checkpoint(model, TEXT, "good", 2)
    assert pair.query == 2
    assert [len(each) for each in pair.args] == [10, 10, 10]
    assert pair.args[2].tolist() == [0] * 8 + [1, 1]


def test_rows_of_a_folder_that_pools(folder):
    """A folder of sentence-transformers; what its output reads is traced."""
    model = folder("bert")
    (model / "1_Pooling").mkdir()
    said = {"pooling_mode_mean_tokens": True, "word_embedding_dimension": 8}
    (model / "1_Pooling" / "config.json").write_text(json.dumps(said))
    assert of_checkpoint(model, TEXT, None, None).query == "pooled"
    request = Request(model=str(model), text=TEXT, method="attention_rollout")
    found = explain(request, Console(quiet=True))
    function = xv.models.load(model).explainable()
    ids = xv.models.text(model)(TEXT).ids
    expected = xv.attention_rollout(function, query="mean")(jnp.asarray(ids))
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def subject(output, **options):
    """What is explained of a model that only has an output."""
    forward = lambda _, x: x * jnp.array(output)
    read = lambda other: (jnp.array(float(other)),)
    options = {"read": read, **options}
    args = (jnp.array(1.0),)
    return Subject(forward=forward, parameters=None, args=args, view=None, **options)


def test_targets_of_classes():
    of = subject([0.0, 2.0, 1.0], name="abc".__getitem__, find="abc".index)
    predicted = choose(of, None, None, None)
    assert (predicted.target, predicted.said) == (1, "b")
    assert predicted.ranked == ("b 66.5%", "c 24.5%", "a 9.0%")
    pair = choose(of, "c", "0", None)
    assert (pair.target, pair.said) == ((2, 0), "c and not a")
    for wrong, said in (
        (("9", None, None), "a number below 3, got 9"),
        ((None, "1", None), "`--versus` is a class, and needs another"),
        (("1", None, "5"), "and no `--target`"),
    ):
        with pytest.raises(ValueError, match=said):
            choose(of, *wrong)
    with pytest.raises(ValueError, match="a class is a number here, got 'cat'"):
        choose(subject([1.0, 2.0]), "cat", None, None)
    with pytest.raises(ValueError, match=r"array of \[1, 2\], wanted one number"):
        choose(subject([[1.0, 2.0]]), None, None, None)


def test_targets_of_features():
    of = subject([3.0, 4.0], features=True)
    length = choose(of, None, None, None)
    assert length.said == "length of the features as they point"
    np.testing.assert_allclose(length.target(jnp.array([3.0, 4.0])), 5)
    np.testing.assert_allclose(length.target(jnp.array([4.0, -3.0])), 0, atol=1e-6)
    cosine = choose(of, None, None, "-2")
    np.testing.assert_allclose(cosine.target(jnp.array([6.0, 8.0])), -1, rtol=1e-6)
    assert choose(of, "1", None, None).said == "feature 1"
    with pytest.raises(ValueError, match="needs another"):
        choose(of, "1", "0", None)


def test_an_image(tmp_path, capsys):
    model = Path(shutil.copytree(GOLDENS / "vision" / "vit", tmp_path / "vit"))
    settings = {"image_processor_type": "ViTImageProcessor"}
    size = {"size": {"height": 16, "width": 16}}
    (model / "preprocessor_config.json").write_text(json.dumps(settings | size))
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "$x^$.png")
    out = tmp_path / "out.svg"
    arguments = ["--image", tmp_path / "$x^$.png", "--method", "attention_rollout"]
    code, said, _ = run(capsys, "--model", model, *arguments, "--out", out)
    assert code == 0
    assert "attention_rollout: LABEL_" in said
    assert "<svg" in out.read_text()


def test_a_function_and_an_array(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.full((2, 3), 2, np.float32))
    arguments = ["--model", "tests.test_explain:linear", "--array", tmp_path / "x.npy"]
    options = ["--option", "steps=4", "--option", "rule=midpoint", "--target", "1"]
    out = tmp_path / "out.pdf"
    code, said, _ = run(capsys, *arguments, *options, "--out", out)
    assert code == 0
    assert "integrated_gradients: 1, 30" in said
    assert "evaluations: 4" in said
    assert out.read_bytes().startswith(b"%PDF")


def curved(x):
    """A function with a named value."""
    return linear(checkpoint_name(jnp.tanh(x), "hidden"))


ON_POSITIONS = ["grad_cam", "hires_cam", "leave_one_out"]
ON_POSITIONS += [name for name in methods() if hasattr(xv.attention, name)]
# What methods need besides a model and an input, and what makes them short.
OPTIONS = {
    "conductance": ["at=hidden", "steps=2"],
    "internal_influence": ["at=hidden", "steps=2"],
    "expected_gradients": ["baselines=[[[0.5,0,0],[0,1,0]]]", "samples=2"],
    "blur_integrated_gradients": ["sigma=1"],
    "guided_integrated_gradients": ["steps=5"],
    "learned_mask": ["steps=2", "cells=2"],
    "occlusion": ["window=1"],
    "rise": ["samples=8", "cells=2"],
    "value_zeroing": ["last=block"],
}


@pytest.mark.parametrize("name", ON_POSITIONS)
def test_every_method_of_positions_by_name(name, folder, capsys):
    arguments = ["--model", folder("bert_sequence"), "--text", TEXT]
    code, said, error = run(capsys, *arguments, "--method", name)
    assert (code, error) == (0, "")
    assert f"{name}: LABEL_" in said
    assert TEXT in said


def attending(x):
    """Of an image of 8 x 8, with a class token and patches of 4 x 4."""
    patches = x.reshape(2, 4, 2, 4).swapaxes(1, 2).reshape(4, 16)
    tokens = jnp.concatenate([jnp.ones((1, 16)), patches])
    weights = jax.nn.softmax(tokens @ tokens.T / 4)
    return checkpoint_name(tokens + weights @ tokens, "block")[0, :3]


def probing(x):
    """Of a sequence of 6 x 4 that attends to itself and is read by a probe."""
    x = x + jax.nn.softmax(x @ x.T) @ x
    probe = jnp.asarray(np.eye(2, 4, dtype=np.float32))
    read = jax.nn.softmax(probe @ x.T) @ x
    return (probe + read).sum(axis=0)


@pytest.mark.parametrize("name", [n for n in methods() if hasattr(xv.attention, n)])
def test_every_attention_method_of_an_array(name, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8))
    model = ["--model", "tests.test_explain:attending", "--array", tmp_path / "x.npy"]
    out = tmp_path / "out.png"
    options = [part for each in OPTIONS.get(name, []) for part in ("--option", each)]
    arguments = ["--method", name, *options, "--out", out]
    code, said, error = run(capsys, *model, *arguments)
    assert (code, error) == (0, "")
    assert f"{name}: " in said
    # LRP explains pixels.
    assert ("drawn as 2 x 2 patches, the first 1 left out" in said) != ("lrp" in name)
    assert out.read_bytes().startswith(PNG)


def test_scores_of_several_sequences(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.linspace(-1, 1, 24, dtype=np.float32).reshape(6, 4))
    model = ["--model", "tests.test_explain:probing", "--array", tmp_path / "x.npy"]
    out = tmp_path / "out.svg"
    arguments = ["--method", "attention_relevance", "--out", out]
    code, said, error = run(capsys, *model, *arguments)
    assert (code, error) == (0, "")
    assert len(re.findall(r"strongest positions of \S+: \d: ", said)) == 2
    assert "<svg" in out.read_text()


def test_all_of_a_text_is_shown():
    """Also what no token stands for."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("!", "removed")
    encoding = TextProcessor(made)("!so! good!!")
    words, values = show.spelled(encoding, np.ones(len(encoding.ids)), "token")
    assert "".join(words) == "!so! good!!"
    assert len(words) == len(values)


def test_lists_of_integers_for_an_array(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.full((2, 3), 2, np.float32))
    model = ["--model", "tests.test_explain:linear", "--array", tmp_path / "x.npy"]
    options = ["--target", "1", "--option", "baseline=[[0,0,0],[1,1,1]]"]
    code, said, error = run(capsys, *model, *options)
    assert (code, error) == (0, "")
    assert "integrated_gradients: 1, 30" in said
    groups = ["--method", "feature_ablation", "--option", "groups=[[0,0,1],[1,2,2]]"]
    code, said, error = run(capsys, *model, *groups)
    assert (code, error) == (0, "")


def test_names_of_the_embedded_model(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((28, 28), np.float32))
    model = ["--model", "embedded", "--array", tmp_path / "x.npy"]
    code, said, _ = run(capsys, *model, "--method", "saliency", "--target", "Bag")
    assert code == 0
    assert "saliency: Bag, " in said


def test_a_colour_image_of_an_array():
    image = np.random.default_rng(0).uniform(size=(4, 4, 3)).astype(np.float32)
    of = Subject(
        forward=lambda _, x: x, parameters=None, args=(jnp.asarray(image),), view=None
    )
    found = xv.Attribution(scores=jnp.asarray(image), output=jnp.float32(0))
    figure = show.attribution(of, found, "word", "title", Console(quiet=True))
    left, right = figure.axes
    assert left.get_images() and right.get_images()


def test_what_is_drawn_as_patches():
    """Where tokens are surely patches; else as bars."""
    assert show.patches((28, 28), 197) == (14, 14)
    assert show.patches((224, 224, 3), 201) == (14, 14)
    assert show.patches((224, 224, 3), 150) is None
    # Rows may be tokens.
    assert show.patches((16, 16), 17) is None
    assert show.patches((64, 16), 16) is None
    # Channels first.
    assert show.patches((28, 28, 28), 197) is None
    assert show.strongest(np.array([0.25, -1.0, 0.5])) == "1: -1, 2: 0.5, 0: 0.25"


@pytest.mark.parametrize("name", [n for n in methods() if n not in ON_POSITIONS])
def test_every_other_method_by_name(name, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.full((2, 3), 2, np.float32))
    model = ["--model", "tests.test_explain:curved", "--array", tmp_path / "x.npy"]
    options = [part for each in OPTIONS.get(name, []) for part in ("--option", each)]
    arguments = [*model, "--method", name, "--target", "1"]
    code, said, error = run(capsys, *arguments, *options)
    assert (code, error) == (0, "")
    assert f"{name}: 1, " in said
    needed = [p for p in inspect.signature(methods()[name]).parameters.values()][1:]
    if any(parameter.default is parameter.empty for parameter in needed):
        code, said, error = run(capsys, *arguments)
        assert (code, said) == (2, "")
        assert re.search(rf"{name} needs an `--option` for each of \['\w+'\]", error)


def test_methods_are_the_public_ones():
    found = methods()
    assert "neuron" not in found
    assert {"integrated_gradients", "saliency", "attention_rollout"} <= set(found)
    assert "single" not in found
    assert all(found[name] is getattr(xv, name) for name in found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "magic"], r"`--method` is one of \[.*got 'magic'"),
        (["--option", "steps"], "is NAME=VALUE with one of .*got 'steps'"),
        (["--option", "argnums=0"], "is NAME=VALUE with one of"),
        (["--option", "steps=0"], "steps"),
        (
            ["--method", "attention_rollout", "--option", "query=null"],
            "`query` is one position here",
        ),
        (["--out", "why.gif"], "ends in one of .*got why.gif"),
        (["--out", "nowhere/why.png"], "a folder that is there, got nowhere/why.png"),
        (["--position", "1"], "takes no `position`"),
        (["--prepare", "."], "are for a function"),
    ],
)
def test_wrong_calls(arguments, said, folder, capsys):
    options = ["--model", folder("bert_sequence"), "--text", TEXT, *arguments]
    code, printed, error = run(capsys, *options)
    assert code == 2
    assert not printed
    assert error.startswith("xviz-jax explain: ")
    assert re.search(said, error), error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["embedded", "--text", "a"], "pass --prepare FOLDER; or pass an --array"),
        (["embedded", "--array", "no.npy"], "no.npy holds no array"),
        (["embedded", "--array", "no.npy", "--position", "1"], "not for a function"),
        (["math:sin", "--image", "a", "--pair", "b"], "needs a first"),
        (["nowhere:f", "--array", "a"], "cannot be imported"),
        (["embedded", "--array", "{tmp}/wrong.npy"], "TypeError: "),
        (["embedded", "--array", "{tmp}/none.npy"], "an array of [0], wanted"),
        (["{gpt2}", "--text", "film", "--pair", "good"], "takes no pair of texts"),
        (["nowhere", "--text", "a"], "there is no checkpoint at nowhere"),
        ([str(GOLDENS / "text" / "bert"), "--image", "a"], "the model reads texts"),
        ([str(GOLDENS / "text" / "bert"), "--text", "a"], "has no tokenizer.json"),
        ([str(GOLDENS / "text" / "bert"), "--array", "a"], "are for a function"),
        ([str(GOLDENS / "vision" / "vit"), "--text", "a"], "the model reads images"),
    ],
)
def test_wrong_sources(arguments, said, folder, tmp_path, capsys):
    np.save(tmp_path / "wrong.npy", np.zeros(6, np.float32))
    np.save(tmp_path / "none.npy", np.zeros(0, np.float32))
    gpt2 = folder("gpt2_sequence") if "{gpt2}" in arguments else ""
    arguments = [each.format(tmp=tmp_path, gpt2=gpt2) for each in arguments]
    code, printed, error = run(capsys, "--model", *arguments)
    assert (code, printed) == (2, "")
    assert said in error


def spoil(folder, kind):
    weights = folder / "model.safetensors"
    if kind == "missing":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    else:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"model_type": kind}))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "has no model.safetensors"),
        ("truncated", "is truncated or no safetensors file"),
        ("siglip", "'siglip' is planned and not read yet"),
        ("roberta", "`architectures` in config.json is"),
    ],
)
def test_bad_folders_end_with_2(kind, said, folder, capsys):
    model = folder("bert_sequence")
    spoil(model, kind)
    code, printed, error = run(capsys, "--model", model, "--text", TEXT)
    assert (code, printed) == (2, "")
    assert said in error


def test_a_call_without_a_source(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["explain", "--model", "embedded"])
    assert stopped.value.code == 2
    assert "--text" in capsys.readouterr().err


def test_words_are_shaded_and_never_obeyed():
    encoding = TextProcessor(tokenizer())("[red] film\n\x1b[31mgood\u202e")
    words, scores = show.spelled(encoding, np.array([0, 1, -2, 0.001, 0]), "token")
    assert "".join(words) == "[CLS] [red] film\n\x1b[31mgood\u202e [SEP]"
    text = show.shaded(words, scores)
    assert text.plain == "[CLS] [red] film\n\ufffd[31mgood\ufffd [SEP]"
    styled = {text.plain[s.start : s.end]: str(s.style) for s in text.spans}
    assert styled == {
        "[red]": "black on rgb(234,147,148)",
        "film": "black on rgb(31,119,180)",
    }
    orange = show.shaded(["a"], np.array([2.0]))
    assert str(orange.spans[0].style) == "black on rgb(255,127,14)"


def test_methods_need_no_extra():
    """As in the environment of `make demo`, which has no pyarrow."""
    asked = (
        "import sys; sys.modules['pyarrow'] = sys.modules['flax'] = None; "
        "from xviz_jax.methods import methods; assert 'saliency' in methods()"
    )
    subprocess.run([sys.executable, "-c", asked], check=True)
