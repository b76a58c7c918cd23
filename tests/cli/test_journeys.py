"""From a base model to a trained adapter, and what can be done with it: as a user does it, with checks on results."""

import json

import pytest
import torch
from safetensors.torch import load_file

import graft as library
from graft.core.delta import METHODS, Delta
from graft.methods import load as load_methods
from graft.training import objectives
from graft.training.objectives.tokens import TokenLoss


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def plain_logits(model, processor, texts):
    batch = processor(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**batch).logits


def test_classifier_is_trained_saved_and_measured(graft, house, classifier):
    config = json.loads((classifier / "adapter_config.json").read_text())
    assert config["heads"] == ["bert.pooler", "classifier"]
    assert config["task"]["config"]["id2label"] == {"0": "disliked", "1": "liked"}
    history = [json.loads(line) for line in (classifier / "history.jsonl").read_text().splitlines()]
    best = max((r["validation"] for r in history if "validation" in r), key=lambda v: (v["accuracy"], -v["loss"]))
    assert best["accuracy"] > 0.9
    assert not classifier.with_name("classifier.run").exists()
    measured = graft(
        "eval", house / "bert", "--adapter", classifier, "--data", house / "reviews.jsonl", "--json"
    ).json  # fmt: skip
    rows = [json.loads(line) for line in (house / "reviews.jsonl").read_text().splitlines()]
    base = library.load_adapted(house / "bert", classifier)
    logits = plain_logits(base.model, base.processor, [r["text"] for r in rows])
    right = [base.model.config.id2label[i] == r["label"] for i, r in zip(logits.argmax(-1).tolist(), rows)]
    assert measured["accuracy"] == pytest.approx(sum(right) / len(rows))
    assert f"{measured['accuracy']:.4g}" in graft(
        "eval", house / "bert", "--adapter", classifier, "--data", house / "reviews.jsonl"
    ).out  # fmt: skip


def test_predictions_are_those_of_the_model(graft, house, classifier, tmp_path):
    rows = [json.loads(line) for line in (house / "reviews.jsonl").read_text().splitlines()][:5]
    base = library.load_adapted(house / "bert", classifier)
    chances = plain_logits(base.model, base.processor, [r["text"] for r in rows]).softmax(-1).max(-1)
    texts = [part for r in rows for part in ("--text", r["text"])]
    said = graft("predict", house / "bert", "--adapter", classifier, *texts, "--json").json
    assert [s["label"] for s in said] == [base.model.config.id2label[i] for i in chances.indices.tolist()]
    torch.testing.assert_close(torch.tensor([s["probability"] for s in said]), chances.values)
    done = graft("predict", house / "bert", "--adapter", classifier, "--data", house / "reviews.jsonl",
                 "--output", tmp_path / "said.jsonl")  # fmt: skip
    assert done.code == 0
    written = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [w["prediction"]["label"] for w in written[:5]] == [s["label"] for s in said]
    assert [w["text"] for w in written[:5]] == [r["text"] for r in rows]
    assert [p.name for p in tmp_path.iterdir()] == ["said.jsonl"]
    assert "liked" in graft("predict", house / "bert", "--adapter", classifier, *texts).out


def test_an_untrained_classifier_says_so(graft, house, classifier):
    asked = ["--text", "the film was good", "--objective", "classification"]
    assert "classifier: a new one, not trained" in graft("predict", house / "bert", *asked).err
    assert graft("predict", house / "bert", "--adapter", classifier, *asked).err == ""


def test_a_merged_classifier_answers_as_the_adapted_one(graft, house, classifier, tmp_path):
    report = graft("merge", house / "bert", "--adapter", classifier, "--output", tmp_path / "plain", "--json").json
    assert report["dtype"] == "float32" and report["modules"] == len(report["lost"]) == 14
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    processor = AutoTokenizer.from_pretrained(tmp_path / "plain")
    base = library.load_adapted(house / "bert", classifier)
    texts = ["the film was good", "awful book"]
    torch.testing.assert_close(
        plain_logits(plain, processor, texts), plain_logits(base.model, base.processor, texts), rtol=1e-4, atol=1e-5
    )
    assert plain.config.id2label == {0: "disliked", 1: "liked"}
    assert [p.name for p in tmp_path.iterdir()] == ["plain"]
    assert graft("merge", house / "bert", "--adapter", classifier, "--output", tmp_path / "plain").code == 2


def test_merging_into_bfloat16_says_what_rounding_swallows(graft, house, classifier, tmp_path):
    done = graft("merge", house / "bert", "--adapter", classifier, "--output", tmp_path / "half", "--dtype", "bfloat16",
                 "--json")  # fmt: skip
    lost = done.json["lost"]
    assert max(lost.values()) > 1e-4
    stored = load_file(tmp_path / "half" / "model.safetensors")
    exact = library.load_adapted(house / "bert", classifier, dtype="bfloat16").model
    merged = library.merged_state_dict(exact)
    assert same(stored, {k: v for k, v in merged.items() if k in stored}) and stored.keys() <= merged.keys()


def test_a_language_model_learns_to_complete_and_merges(graft, house, tmp_path):
    done = graft("tune", house / "llama", "--data", house / "prompts.jsonl", "--output", tmp_path / "lm", "--steps", 40,
                 "--learning-rate", "2e-2", "--targets", "q_proj,v_proj,mlp", "--json")  # fmt: skip
    told = done.json
    assert told["objective"] == "causal-lm" and told["steps"] == 40
    assert told["history"][-1]["loss"] < told["history"][0]["loss"] / 2
    ask = ["--prompt", "the film was", "--max-new-tokens", 5]
    assert graft("generate", house / "llama", "--adapter", tmp_path / "lm", *ask).out == " very good\n"
    assert graft("generate", house / "llama", *ask).out != " very good\n"
    drawn = [
        graft("generate", house / "llama", *ask, "--temperature", 2.0, "--seed", s, "--json").json for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert graft("merge", house / "llama", "--adapter", tmp_path / "lm", "--output", tmp_path / "plain").code == 0
    assert graft("generate", tmp_path / "plain", *ask).out == " very good\n"


def test_a_tied_matrix_that_changes_is_stored_on_its_own(graft, house, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tied = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(house / "llama", tie_word_embeddings=True))
    AutoTokenizer.from_pretrained(house / "llama").save_pretrained(tmp_path / "tied")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    tied.save_pretrained(tmp_path / "tied")
    base = library.load_base(tmp_path / "tied")
    assert base.heads == []
    adapter = library.attach(base.model, "lora", "head", rank=2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        wanted = base.model(ids).logits
        library.save_merged(base.model, tmp_path / "plain")
        torch.testing.assert_close(base.model(ids).logits, wanted, rtol=0, atol=0)
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
        torch.testing.assert_close(back(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert base.model.config.tie_word_embeddings and not back.config.tie_word_embeddings


def test_an_encoder_decoder_learns_predicts_and_generates(graft, house, tmp_path):
    done = graft("tune", house / "t5", "--data", house / "pairs.jsonl", "--output", tmp_path / "s2s", "--steps", 60,
                 "--learning-rate", "3e-2", "--rank", 8, "--json")  # fmt: skip
    assert done.json["objective"] == "seq2seq"
    assert done.json["history"][-1]["loss"] < done.json["history"][0]["loss"]
    model = [house / "t5", "--adapter", tmp_path / "s2s"]
    asked = graft("generate", *model, "--prompt", "good film", "--max-new-tokens", 6, "--json").json
    said = graft("predict", *model, "--text", "good film", "--max-new-tokens", 6, "--json").json
    assert [a["text"] for a in asked] == said


def test_images_are_classified_from_files(graft, tmp_path):
    """A folder of PNG files for each label, and a table with paths; the probabilities are those of transformers."""
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, initializer_range=0.3)).save_pretrained(
        tmp_path / "vit"
    )
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "vit")
    rows = []
    for i in range(16):
        label, shade = ("red", "blue")[i % 2], 180 + 4 * i
        file = tmp_path / "images" / label / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (shade, 30, 30) if label == "red" else (30, 30, shade)).save(file)
        rows.append({"image": str(file), "label": label})
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    done = graft("tune", tmp_path / "vit", "--data", tmp_path / "images", "--output", tmp_path / "out", "--epochs", 20,
                 "--learning-rate", "1e-2", "--validation", 0.25, "--json")  # fmt: skip
    assert done.json["objective"] == "image-classification" and done.json["labels"] == ["blue", "red"]
    assert done.json["validation"]["accuracy"] == 1
    model = [tmp_path / "vit", "--adapter", tmp_path / "out"]
    assert graft("eval", *model, "--data", tmp_path / "table.jsonl", "--json").json["accuracy"] == 1
    said = graft("predict", *model, "--data", tmp_path / "table.jsonl", "--json").json
    assert [s["label"] for s in said] == [row["label"] for row in rows]
    assert graft("merge", *model, "--output", tmp_path / "merged").code == 0
    plain = ViTForImageClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        pixels = processor([Image.open(row["image"]) for row in rows], return_tensors="pt")
        likeliest = plain(**pixels).logits.softmax(-1).max(-1).values
    assert [s["probability"] for s in said] == pytest.approx(likeliest.tolist(), rel=1e-4)

    (tmp_path / "images" / "red" / "torn.png").write_bytes(b"\x89PNG\r\n")
    torn = graft("tune", tmp_path / "vit", "--data", tmp_path / "images", "--output", tmp_path / "other")
    assert torn.code == 2 and "torn.png" in torn.err and torn.err.count("\n") == 1
    assert not list(tmp_path.glob("other*"))


def test_a_prompt_leaves_positions_to_the_text(graft, house, tmp_path):
    (tmp_path / "long.jsonl").write_text("".join(
        json.dumps({"text": "the film was good " * 40, "label": label}) + "\n" for label in ("a", "b") * 2
    ))  # fmt: skip
    run = ["tune", house / "bert", "--data", tmp_path / "long.jsonl", "--method", "prompt_tuning", "--steps", 1]
    assert graft(*run, "--length", 8, "--output", tmp_path / "short").code == 0
    model = [house / "bert", "--adapter", tmp_path / "short"]
    assert graft("eval", *model, "--data", tmp_path / "long.jsonl").code == 0
    full = graft(*run, "--length", 100, "--output", tmp_path / "full")
    assert full.code == 2 and "leaves no room for text in the 64 positions" in full.err


def test_chat_goes_through_the_template_of_the_tokenizer(graft, house, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    turns = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"
    template = turns + "{% if add_generation_prompt %}a{% endif %}"
    words = AutoTokenizer.from_pretrained(house / "llama")
    words.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(house / "llama")
    model.save_pretrained(tmp_path / "chat")
    words.save_pretrained(tmp_path / "chat")
    ids = words("s dull u good film a", add_special_tokens=False, return_tensors="pt")["input_ids"]
    wanted = words.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :], True)
    chat = graft("generate", tmp_path / "chat", "--prompt", "good film", "--chat", "--system", "dull",
                 "--max-new-tokens", 4)  # fmt: skip
    assert chat.out == f"{wanted}\n"
    assert "no chat template" in graft("generate", house / "llama", "--prompt", "x", "--chat").err


def test_a_recipe_gives_the_bits_of_the_options(graft, house, tmp_path):
    options = ["--rank", 3, "--alpha", 4, "--targets", "qv", "--learning-rate", "1e-3", "--steps", 3, "--seed", 7]
    data = ["--data", house / "prompts.jsonl"]
    assert graft("tune", house / "llama", *data, *options, "--output", tmp_path / "a",
                 "--save-recipe", tmp_path / "saved.yaml").code == 0  # fmt: skip
    (tmp_path / "own.yaml").write_text(
        f"model: {house}/llama\ndata: {house}/prompts.jsonl\nmethod: lora\nrank: 3\nalpha: 4\ntargets: qv\n"
        "learning-rate: 1e-3\nsteps: 9\nseed: 7\n"
    )
    assert graft("tune", "--recipe", tmp_path / "own.yaml", "--steps", 3, "--output", tmp_path / "b").code == 0
    assert graft("tune", "--recipe", tmp_path / "saved.yaml", "--output", tmp_path / "c").code == 0
    assert graft("tune", "--recipe", tmp_path / "a" / "recipe.yaml", "--output", tmp_path / "d", "--seed", 8).code == 0
    a, b, c, d = (tensors(tmp_path / name) for name in "abcd")
    assert same(a, b) and same(a, c) and not same(a, d)


def test_python_gives_the_bits_of_the_command(graft, house, tmp_path):
    assert graft("tune", house / "llama", "--data", house / "prompts.jsonl", "--rank", 2, "--steps", 2,
                 "--output", tmp_path / "a").code == 0  # fmt: skip
    done = library.tune(house / "llama", f"{house}/prompts.jsonl", method=library.LoRA(rank=2), steps=2, progress=False)
    assert same(tensors(tmp_path / "a"), {k: v.detach() for k, v in done.adapter.state_dict().items()})


def test_a_stopped_run_resumes_to_the_same_bits(graft, house, tmp_path, monkeypatch):
    run = [
        "tune",
        house / "llama",
        "--data",
        house / "prompts.jsonl",
        "--steps",
        6,
        "--save-every",
        2,
        "--dropout",
        0.2,
    ]
    assert graft(*run, "--output", tmp_path / "whole").code == 0
    loss, calls = TokenLoss.loss, []

    def stop(self, model, batch):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TokenLoss, "loss", stop)
        stopped = graft(*run, "--output", tmp_path / "cut")
    assert stopped.code == 130 and "Traceback" not in stopped.err
    assert not (tmp_path / "cut").exists()
    again = graft(*run, "--output", tmp_path / "cut")
    assert again.code == 2 and "resume" in again.err
    assert graft(*run, "--output", tmp_path / "cut", "--resume").code == 0
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    lines = [len((tmp_path / n / "history.jsonl").read_text().splitlines()) for n in ("whole", "cut")]
    assert lines == [6, 6]


def test_a_linear_probe_is_the_method_full(graft, house, tmp_path):
    data = ["--data", house / "reviews.jsonl", "--steps", 2]
    done = graft("tune", house / "bert", *data, "--method", "full", "--output", tmp_path / "probe", "--json")
    trained = {key.split(":")[0] for key in tensors(tmp_path / "probe")}
    assert trained == {"bert.pooler", "classifier"} and done.json["heads"] == []
    assert graft("eval", house / "bert", "--adapter", tmp_path / "probe", "--data", house / "reviews.jsonl").code == 0


def test_every_objective_names_a_class_that_transformers_or_a_base_has():
    import transformers

    objectives.find("classification")
    shipped = [cls.__name__ for name in library.bases.names() for cls in library.bases.find(name).models().values()]
    for objective in objectives.OBJECTIVES.values():
        ending = objective.auto.removeprefix("AutoModel")
        assert hasattr(transformers, objective.auto) or any(name.endswith(ending) for name in shipped)


def test_an_option_called_like_another_gets_the_name_of_the_method(graft, house, tmp_path):
    seen = {}

    class Clash(Delta, name="test_clash"):
        """W' = W + v, with a hyperparameter called like a setting of training."""

        def __init__(self, site, *, warmup: float = 0.5):
            super().__init__(site)
            seen["warmup"] = warmup
            self.v = torch.nn.Parameter(torch.zeros(site.d_out, 1))

        def weight(self, w):
            return w + self.v

    try:
        run = ["tune", house / "llama", "--data", house / "prompts.jsonl", "--steps", 1, "--method", "test_clash"]
        assert graft(*run, "--output", tmp_path / "a", "--warmup", 0, "--test-clash.warmup", 0.25).code == 0
        assert seen["warmup"] == 0.25
        assert graft("tune", "--recipe", tmp_path / "a" / "recipe.yaml", "--output", tmp_path / "b").code == 0
        assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    finally:
        del METHODS["test_clash"]


def test_several_methods_are_trained_together_and_travel_as_one(graft, house, tmp_path):
    data = ["--data", house / "prompts.jsonl"]
    made = graft("tune", house / "llama", *data, "--validation", house / "prompts.jsonl", "--steps", 3,
                 "--learning-rate", "1e-2", "--method", "lora", "--method=dora", "--method", "ia3", "--lora.rank", 2,
                 "--dora.rank", 3, "--on", "output", "--output", tmp_path / "a", "--json")  # fmt: skip
    assert made.code == 0, made.err
    rank = {n: {len(v) for k, v in tensors(tmp_path / "a" / n).items() if k.endswith("A")} for n in ("lora", "dora")}
    assert rank == {"lora": {2}, "dora": {3}} and made.json["method"] == ["lora", "dora", "ia3"]
    measured = graft("eval", house / "llama", "--adapter", tmp_path / "a", *data, "--json").json
    assert measured == pytest.approx(made.json["validation"], rel=1e-4)
    base = graft("eval", house / "llama", *data, "--json").json
    assert measured["loss"] < base["loss"]
    shown = graft("show", tmp_path / "a", "--json").json
    assert shown["kind"] == "adapters" and [a["name"] for a in shown["adapters"]] == ["lora", "dora", "ia3"]
    assert sum(a["parameters"] for a in shown["adapters"]) == made.json["trained parameters"]
    assert all(f"{tmp_path / 'a'}/{n}" in graft("show", tmp_path / "a").out for n in ("lora", "dora", "ia3"))
    assert graft("tune", "--recipe", tmp_path / "a" / "recipe.yaml", "--output", tmp_path / "b").code == 0
    for name in ("lora", "dora", "ia3"):
        assert same(tensors(tmp_path / "a" / name), tensors(tmp_path / "b" / name))
    merged = graft("merge", house / "llama", "--adapter", tmp_path / "a", "--output", tmp_path / "m", "--json")
    assert merged.code == 0
    plain = graft("eval", tmp_path / "m", *data, "--json").json
    assert plain == pytest.approx(measured, rel=1e-3)


load_methods()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_trained_and_comes_back(graft, house, tmp_path, name):
    hyper = [part for k, v in METHODS[name].small.items() for part in (f"--{k.replace('_', '-')}", json.dumps(v))]
    flags = [a for a in hyper if a not in ("true", "false")]
    data = ["--data", house / "prompts.jsonl"]
    trained = graft("tune", house / "llama", *data, "--validation", house / "prompts.jsonl", "--method", name, *flags,
                    "--steps", 3, "--learning-rate", "1e-2", "--output", tmp_path / "a", "--json")  # fmt: skip
    assert trained.code == 0, trained.err
    measured = graft("eval", house / "llama", "--adapter", tmp_path / "a", *data, "--json").json
    assert measured == pytest.approx(trained.json["validation"], rel=1e-4)
    if METHODS[name].packed is Delta.packed:
        assert graft("show", tmp_path / "a", "--json").json["parameters"] >= trained.json["trained parameters"]
