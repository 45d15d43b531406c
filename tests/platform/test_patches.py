"""What is changed in torch for the sake of Megatron Core leaves torch usable by others."""


def test_torch_device_contexts_still_work() -> None:
    """transformers builds models under `with torch.device("meta")`."""
    import torch

    from megatron_tpt import platform  # noqa: F401

    with torch.device("meta"):
        assert torch.zeros(2).device.type == torch.tensor([1.0]).device.type == torch.arange(3).device.type == "meta"
    assert torch.zeros(2).device.type == "cpu"


def test_types_of_torch_stay_types() -> None:
    """transformers names streams in annotations, which are evaluated as it is imported."""
    import torch

    from megatron_tpt import platform  # noqa: F401

    assert torch.cuda.Stream | None
