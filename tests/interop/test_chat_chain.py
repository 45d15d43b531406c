"""From chats to a chat model that stops: pack_sft, fine-tuning, export, answers from vLLM and from transformers.

Twice: from random weights with a base model's tokenizer (documents end with <|endoftext|>, turns with <|im_end|>, as in
Qwen2.5), and from an imported chat model whose generation_config.json names two end tokens.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow(minutes=1)
REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ANSWERS = {"a+1": "Tue", "b+2": "Wed", "c+3": "Thu", "d+4": "Fri", "e+5": "Sat", "f+6": "Sun"}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


def _run(*arguments: Any) -> str:
    """Run a tool of this project as a user does; its output."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def _base_tokenizer(folder: Path) -> Path:
    """The demo's tokenizer with the turn tokens of ChatML; its end of sequence stays that of documents."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "examples/demo/teacher")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.chat_template is None
    return folder


def _chat_model(folder: Path, tokenizer: Path) -> Path:
    """A chat model with random weights: its own template, two end tokens, sampling defaults, a padding token."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = TEMPLATE
    loaded.save_pretrained(folder)
    ends = loaded.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(loaded),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            eos_token_id=ends,
            pad_token_id=ends[1],
            bos_token_id=None,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1], **SAMPLING)
    model.save_pretrained(folder)
    return folder


def _finetune_and_export(folder: Path, packed: Path, recipe: dict[str, Any]) -> Path:
    recipe = {
        "run": {"output_dir": str(folder / "run")},
        "data": {"train": [str(packed)]},
        "optimizer": {"learning_rate": 4.0e-3, "schedule": "constant"},
        "logging": {"log_interval": 50},
        **recipe,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sft.yaml").write_text(yaml.safe_dump(recipe))
    _run("-m", "megatron_tpt.finetune", folder / "sft.yaml")
    model = folder / "model"
    _run("tools/export_hf.py", "--checkpoint", folder / "run/checkpoints/latest", "--output", model)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The exported models of both chains."""
    folder = tmp_path_factory.mktemp("chain")
    tokenizer = _base_tokenizer(folder / "tokenizer")
    (folder / "template.jinja").write_text(TEMPLATE)
    with (folder / "chats.jsonl").open("w") as file:
        for question, answer in list(ANSWERS.items()) * 8:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"Answer: {answer}"}]
            file.write(json.dumps({"messages": turns}) + "\n")
    pack = ["tools/pack_sft.py", "--input", folder / "chats.jsonl", "--sequence-length", 63]
    # The template comes by option and is nowhere else: the packed index has to carry it.
    _run(*pack, "--tokenizer", tokenizer, "--chat-template", folder / "template.jinja", "--output", folder / "base_sft")
    training = {"num_steps": 160, "sequence_length": 63, "global_batch_size": 4, "dtype": "float32"}
    shape = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 2}
    base = _finetune_and_export(folder / "base", folder / "base_sft", {"model": shape, "training": training})

    original = _chat_model(folder / "original", tokenizer)
    _run("tools/import_hf.py", "--model", original, "--output", folder / "imported")
    _run(*pack, "--tokenizer", original, "--output", folder / "chat_sft")
    chat = _finetune_and_export(
        folder / "chat",
        folder / "chat_sft",
        {"training": {**training, "init_from": str(folder / "imported")}},
    )
    return {"base": base, "chat": chat}


def test_a_fine_tuned_model_answers_and_stops_in_vllm(models: dict[str, Path], tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": q, "answer": f"Answer: {a}"}) + "\n" for q, a in ANSWERS.items()))
    _run(
        "tools/evaluate.py", "--model", *models.values(), "--data", problems, "--output", tmp_path / "results",
        "--chat", "--answer-type", "exact", "--max-new-tokens", 24,
    )  # fmt: skip
    for result in json.loads((tmp_path / "results/results.json").read_text())["models"]:
        assert result["accuracy"] == 1.0, result
        assert result["truncated_fraction"] == 0.0, result


@pytest.mark.parametrize("name", ["base", "chat"])
def test_a_fine_tuned_model_answers_and_stops_in_transformers(models: dict[str, Path], name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models[name])
    model = AutoModelForCausalLM.from_pretrained(models[name])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for question, answer in ANSWERS.items():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert output[-1] == end
        assert tokenizer.decode(output[:-1]) == f"Answer: {answer}"


def test_end_tokens_template_and_sampling_defaults_survive_the_chain(models: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    for name, model in models.items():
        tokenizer = AutoTokenizer.from_pretrained(model)
        end, document_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        generation = json.loads((model / "generation_config.json").read_text())
        assert set(generation["eos_token_id"]) == {end, document_end}, name
        assert tokenizer.chat_template == TEMPLATE, name
    assert {key: generation[key] for key in SAMPLING} == SAMPLING
    config = json.loads((models["chat"] / "config.json").read_text())
    assert config["pad_token_id"] == document_end
