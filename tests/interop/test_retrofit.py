"""Models cut out of transformers' models compute what transformers' own layers do, in the order of the recurrence."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_models import VOCAB_SIZE, hf_logits, some_tokens
from recurrent_reference import Unrolled, state_of_training, state_of_validation

from megatron_tpt import platform
from megatron_tpt.config.load import read_yaml
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.interop.hf_export import export_hf, read_model_config
from megatron_tpt.interop.options import ExportOptions, RetrofitOptions
from megatron_tpt.interop.retrofit import retrofit
from megatron_tpt.models.spec import build_chunks
from megatron_tpt.training.checkpoint_files import damage_of_files
from megatron_tpt.training.checkpoint_loading import load_weights

PARENTS = ["llama", "llama3-scaled-tied", "qwen2", "qwen3-tied", "olmo2"]
SPLIT, LAYERS = (1, 1, 1), [0, 2, 3]  # of four layers, number 1 is dropped


def built(checkpoint: Path, training: TrainingConfig):
    """The model of a checkpoint; within process groups."""
    platform.seed_everything(0)
    (gpt,) = build_chunks(read_model_config(checkpoint), ParallelConfig(), training, seed=0)
    load_weights(checkpoint, gpt)
    return gpt


def logits_of(gpt, tokens: torch.Tensor, **draws: int) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    arguments = {"extra_block_kwargs": {"draws": draws}} if draws else {}
    return gpt(tokens, positions, attention_mask=None, **arguments)[..., :VOCAB_SIZE]


@pytest.mark.parametrize("parent", PARENTS)
def test_logits_equal_those_of_transformers_layers(
    parent: str, hf_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """One iteration with a bypassed adapter is the pruned parent, to the bit; more of them are the unrolled stack."""
    folder, tokens = hf_folder(parent), some_tokens(2, 64)
    recurrent, static, random = (tmp_path / name for name in ("recurrent", "static", "random"))
    retrofit(RetrofitOptions(folder, recurrent, split="1,1,1", adapter="identity"))
    retrofit(RetrofitOptions(folder, static, split="1,1,1", static=True))
    retrofit(RetrofitOptions(folder, random, split="1,1,1", seed=3))
    export_hf(ExportOptions(static, tmp_path / "exported"))
    training = TrainingConfig(dtype="float32")
    with platform.process_groups(ParallelConfig()), torch.no_grad():
        looped, pruned, mixed = (built(one, training).eval() for one in (recurrent, static, random))
        one = logits_of(looped, tokens, recurrences=1, backprop=1, seed=0)
        assert torch.equal(one, logits_of(pruned, tokens))
        torch.testing.assert_close(one, hf_logits(tmp_path / "exported", tokens), rtol=1e-5, atol=1e-5)

        reference = Unrolled(folder, LAYERS, SPLIT)
        reference.adapter.copy_(mixed.decoder.adapter.weight)
        state = state_of_validation(tokens, 128, mixed.decoder.model.state_std)
        for recurrences in (1, 2, 5):
            found = logits_of(mixed, tokens, recurrences=recurrences, backprop=0, seed=0)
            expected = reference(tokens, recurrences, 0, state)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert torch.equal(
            logits_of(mixed, tokens), logits_of(mixed, tokens, recurrences=4, backprop=0, seed=0)
        )  # the mean depth, when none is given


GRADIENTS = {
    "embedding.word_embeddings.weight": "embedding.weight",
    "decoder.adapter.weight": "adapter",
    "decoder.final_layernorm.weight": "norm.weight",
    "output_layer.weight": "head",
}
OF_LAYERS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attn_bda.norm.weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.linear_fc2.bias": "mlp.down_proj.bias",
    "mlp_bda.norm.weight": "post_feedforward_layernorm.weight",
}
GRADIENTS |= {f"decoder.layers.{i}.{ours}": f"layers.{i}.{OF_LAYERS[ours]}" for i in range(3) for ours in OF_LAYERS}


@pytest.mark.parametrize(
    ("parent", "recompute"),
    [
        ("llama", "none"),
        ("llama", "full"),
        ("llama", "block"),
        ("llama", "selective"),
        ("llama-biases-linear", "none"),
        ("olmo2", "none"),
        ("olmo2", "full"),
    ],
)
def test_gradients_equal_those_of_plain_autograd(
    parent: str, recompute: str, hf_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Through all iterations, and through the last ones alone; whatever is computed again."""
    checkpoint, folder, tokens = tmp_path / "recurrent", hf_folder(parent), some_tokens(2, 24)
    retrofit(RetrofitOptions(folder, checkpoint, split="1,1,1"))
    modules = {"recompute_modules": ["core_attn", "mlp"]} if recompute == "selective" else {}
    training = TrainingConfig(dtype="float32", recompute=recompute, recompute_layers=2, **modules)
    with platform.process_groups(ParallelConfig()):
        gpt = built(checkpoint, training)
        for depth in ((0, 1), (0, 3), (3, 2), (4, 1)):
            gpt.zero_grad()
            logits_of(gpt, tokens, recurrences=sum(depth), backprop=depth[1], seed=7).square().mean().backward()
            reference = Unrolled(folder, LAYERS, SPLIT)
            with torch.no_grad():
                reference.adapter.copy_(gpt.decoder.adapter.weight)
            state = state_of_training(tokens, 128, gpt.decoder.model.state_std, seed=7)
            reference(tokens, *depth, state).square().mean().backward()
            ours, theirs = dict(gpt.named_parameters()), dict(reference.named_parameters())
            compared = GRADIENTS.keys() & ours.keys()
            assert all("linear_qkv" in name or "linear_fc1" in name for name in ours.keys() - compared)
            for name in compared:
                expected = theirs[GRADIENTS[name]].grad
                found = ours[name].grad[: len(expected)]
                assert (found - expected).norm() <= 2e-5 * expected.norm(), (depth, name)


def test_what_is_not_in_the_backward_pass_takes_no_memory(hf_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Bytes kept for the backward pass, counted by autograd itself: they stop to grow at the depth with gradient."""
    retrofit(RetrofitOptions(hf_folder("llama"), tmp_path / "recurrent", split="1,1,1"))
    tokens, kept = some_tokens(1, 64), {}
    with platform.process_groups(ParallelConfig()):
        gpt = built(tmp_path / "recurrent", TrainingConfig(dtype="float32"))
        for depth in ((0, 1), (0, 2), (0, 4), (4, 4), (28, 4)):
            storages: dict[int, int] = {}

            def note(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss = logits_of(gpt, tokens, recurrences=sum(depth), backprop=depth[1], seed=1).sum()
            kept[depth] = sum(storages.values())
            del loss
    assert kept[0, 4] - kept[0, 2] == pytest.approx(2 * (kept[0, 2] - kept[0, 1]), rel=0.01)
    assert kept[28, 4] == pytest.approx(kept[0, 4], rel=0.01) == pytest.approx(kept[4, 4], rel=0.01)


def test_a_checkpoint_is_cut_as_the_folder_that_it_came_from(
    hf_folder: Callable[[str], Path], imported: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its other files stay, every file is under a checksum, and chosen layers are taken in their order."""
    for source, name in ((hf_folder("qwen3-tied"), "folder"), (imported("qwen3-tied"), "checkpoint")):
        retrofit(RetrofitOptions(source, tmp_path / name, split="1,2,1", layers="3,0,1,2", seed=1))
    assert "prelude 3; recurrent 0, 1; coda 2; dropped none" in capsys.readouterr().out
    first, second = tmp_path / "folder", tmp_path / "checkpoint"
    assert read_yaml(first / "recipe.yaml") == read_yaml(second / "recipe.yaml")
    assert not damage_of_files(second)
    names = {path.name for path in first.iterdir()}
    assert {"tokenizer", "hf_config.json", "history.json", "generation_config.json"} <= names
    assert names == {path.name for path in second.iterdir()}
    tokens = some_tokens(1, 16)
    with platform.process_groups(ParallelConfig()), torch.no_grad():
        one, other = (built(folder, TrainingConfig(dtype="float32")).eval() for folder in (first, second))
        assert torch.equal(logits_of(one, tokens), logits_of(other, tokens))


def test_untying_alone_changes_nothing_but_the_number_of_parameters(
    hf_folder: Callable[[str], Path], imported: Callable[[str], Path], tmp_path: Path
) -> None:
    retrofit(RetrofitOptions(hf_folder("llama3-scaled-tied"), tmp_path / "untied", untie=True))
    tied, untied = (read_model_config(one) for one in (imported("llama3-scaled-tied"), tmp_path / "untied"))
    assert untied.num_parameters() - tied.num_parameters() == tied.padded_vocab_size * tied.hidden_size
    export_hf(ExportOptions(tmp_path / "untied", tmp_path / "exported"))
    tokens = some_tokens(1, 32)
    assert torch.equal(hf_logits(tmp_path / "exported", tokens), hf_logits(hf_folder("llama3-scaled-tied"), tokens))


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        ({}, "give --split, such as --split 4,8,4"),
        ({"split": "1,2"}, "--split 1,2: give three numbers"),
        ({"split": "1,0,1"}, "--split 1,0,1: give three numbers, the second one at least 1"),
        ({"split": "1,x,1"}, "--split 1,x,1: give numbers with commas"),
        ({"split": "2,2,2"}, "--split 2,2,2 takes 6 layers"),
        ({"split": "1,1,1", "layers": "0,1"}, "--layers 0,1: give 3 numbers, as --split says, from 0 to 3"),
        ({"split": "1,1,1", "layers": "0,1,4"}, "--layers 0,1,4: give 3 numbers, as --split says, from 0 to 3"),
        ({"split": "1,1,1", "untie": True}, "--untie keeps all layers"),
        ({"split": "1,1,1", "static": True, "adapter": "add"}, "--adapter is for a recurrent model"),
        ({"split": "1,1,1", "adapter": "add", "seed": 1}, "--seed is for a random adapter"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict, reported: str, hf_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        retrofit(RetrofitOptions(hf_folder("llama"), tmp_path / "out", **options))
    assert str(refusal.value).startswith(reported)
    assert not (tmp_path / "out").exists()


def test_a_retrofit_is_not_cut_again(hf_folder: Callable[[str], Path], tmp_path: Path) -> None:
    retrofit(RetrofitOptions(hf_folder("llama"), tmp_path / "once", split="1,1,1"))
    with pytest.raises(UserError, match=r"is of model\.family=recurrent: give a model of the family gpt"):
        retrofit(RetrofitOptions(tmp_path / "once", tmp_path / "twice", split="1,1,1"))
