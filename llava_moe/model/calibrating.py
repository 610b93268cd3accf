"""What a dense model does on real samples, for the upcyclers that look at activations or gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_moe.model.layout import StoredModel
from llava_moe.model.measuring import Batch, model_inputs
from llava_moe.model.offload import is_streamed
from llava_moe.moe import MlpSpec
from llava_moe.moe.upcycling import Upcycler
from llava_moe.moe.upcycling.partition_cluster import balanced_kmeans
from llava_moe.moe.upcycling.statistics import NeuronStatistics, collect_statistics

STATISTICS_BYTES = 1 << 30  # as many layers are watched at once as fit into this
_CLUSTERING_ROUNDS = 100
_MAX_INPUTS = 4096


@dataclass(frozen=True)
class Watched:
    """One dense block to watch: where it is, what it is like and for how many experts."""

    path: str
    spec: MlpSpec
    num_experts: int


def statistics_of(
    model: Any,
    part: str,
    blocks: Sequence[Watched],
    upcycler: Upcycler,
    batches: Sequence[Batch],
    labels: Sequence[int],
) -> Iterator[NeuronStatistics]:
    """The statistics of the blocks of one part of the model, one by one.

    The model runs over all batches once for each group of blocks whose statistics fit into memory together.

    Args:
        model: the dense parent, whole or streamed.
        part: "decoder", "vision" or "projector".
        labels: the cluster of every sample, in their order; empty where the upcycler needs no clusters.

    Raises:
        ValueError: the samples do not fit the upcycler.
    """
    gradients = upcycler.needs == "gradients"
    if gradients and is_streamed(model):
        model.enable_input_require_grads()
    owners = _owners(part, batches, labels, int(model.config.image_token_id))
    seen = {"tokens": 0}

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["tokens"] = args[0].shape[:-1].numel()

    def clusters(item: tuple[int, Batch]) -> Tensor:
        mine = owners[item[0]]
        return mine.repeat_interleave(seen["tokens"] // max(len(mine), 1))

    for group in _groups(blocks, upcycler, batches):
        accumulators = [upcycler.new_accumulator(b.spec, b.num_experts, max_inputs=_MAX_INPUTS) for b in group]
        modules: list[tuple[nn.Module, MlpSpec]] = [(model.get_submodule(b.path), b.spec) for b in group]
        hook = modules[0][0].register_forward_pre_hook(count)
        numbered = list(enumerate(batches))
        found = collect_statistics(
            modules, accumulators, numbered, lambda item: _run(model, item[1], gradients), clusters
        )
        hook.remove()
        yield from found


def _groups(blocks: Sequence[Watched], upcycler: Upcycler, batches: Sequence[Batch]) -> Iterator[Sequence[Watched]]:
    tokens = max(batch["input_ids"].numel() for batch in batches)
    most = 0
    for block in blocks:
        D, F = block.spec.hidden, block.spec.intermediate
        floats = tokens * (D + 2 * F)
        floats += F * F if "coactivation_FF" in upcycler.collects else 0
        floats += F * upcycler.num_clusters(block.num_experts) if "importance_CF" in upcycler.collects else 0
        floats += _MAX_INPUTS * D if "inputs_ND" in upcycler.collects else 0
        most = max(most, 4 * floats)
    size = max(1, STATISTICS_BYTES // most)
    for start in range(0, len(blocks), size):
        yield blocks[start : start + size]


def _run(model: Any, batch: Batch, gradients: bool) -> Tensor:
    if not gradients:
        model(**model_inputs(batch), logits_to_keep=1, use_cache=False)
        return torch.zeros(())
    inputs = model_inputs(batch)
    if "pixel_values" in inputs and is_streamed(model):
        # A layer that runs again in the backward must find the same graph, so something before it wants a gradient.
        inputs["pixel_values"] = inputs["pixel_values"].requires_grad_()
    return model(**inputs, labels=batch["labels"], loss_only=True, use_cache=False).loss


def _owners(part: str, batches: Sequence[Batch], labels: Sequence[int], image_token: int) -> list[Tensor]:
    """For each batch the cluster of every token of the decoder, -1 for padding; or else of every picture."""
    found, first = [], 0
    for batch in batches:
        ids = batch["input_ids"]
        mine = torch.zeros(len(ids), dtype=torch.int64)
        if labels:
            mine = torch.tensor(list(labels[first : first + len(ids)]))
        first += len(ids)
        if part == "decoder":
            real = batch["attention_mask"].bool()
            found.append(mine.unsqueeze(-1).expand_as(ids).masked_fill(~real, -1).flatten())
            continue
        # The pictures of all samples follow each other; a sample has as many as its placeholders stand for.
        pictures = batch["pixel_values"].shape[0] if "pixel_values" in batch else 0
        placeholders_B = (ids == image_token).sum(-1)
        if "num_tiles" in batch:
            found.append(mine.repeat_interleave(_tiles_of_samples(batch)))
            continue
        one = int(placeholders_B.sum()) // max(pictures, 1)
        found.append(mine.repeat_interleave(placeholders_B // max(one, 1)))
    return found


def _tiles_of_samples(batch: Batch) -> Tensor:
    """(B,) how many pictures of the tower belong to each sample."""
    tiles = iter(batch["num_tiles"])
    return torch.tensor([sum(next(tiles) for _ in range(number)) for number in batch["batch_num_images"]])


def clusters_of_samples(
    stored: StoredModel, batches: Sequence[Batch], num_clusters: int, generator: torch.Generator
) -> list[int]:
    """The cluster of every sample, of about equal size, by the mean embedding of its words.

    Raises:
        ValueError: there are fewer samples than clusters.
    """
    embedding_VD = stored.read(f"{stored.name_of(stored.model.get_input_embeddings())}.weight")
    points = [_sentence(row, mask, embedding_VD, stored) for b in batches for row, mask in _rows(b)]
    if len(points) < num_clusters:
        raise ValueError(
            f"upcycle.calibration.num_samples: {len(points)} samples cannot be divided into {num_clusters} clusters, "
            "one for each expert; take more samples"
        )
    points_ND = nn.functional.normalize(torch.stack(points), dim=-1)
    even = len(points) - len(points) % num_clusters
    labels_N = balanced_kmeans(points_ND[:even], num_clusters, generator, False, _CLUSTERING_ROUNDS)
    centres_CD = torch.stack([points_ND[:even][labels_N == c].mean(0) for c in range(num_clusters)])
    rest = torch.cdist(points_ND[even:], centres_CD).argmin(-1)
    return torch.cat([labels_N, rest]).tolist()


def _rows(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)


def _sentence(ids_S: Tensor, real_S: Tensor, embedding_VD: Tensor, stored: StoredModel) -> Tensor:
    words = ids_S[real_S & (ids_S != stored.config.image_token_id)]
    return embedding_VD[words].float().mean(0)


def sample_labels(
    stored: StoredModel, upcycler: Upcycler, num_experts: Sequence[int], batches: Sequence[Batch], seed: int
) -> list[int]:
    """The clusters of the samples that an upcycler asks for; empty where it asks for none.

    Raises:
        ValueError: layers of unequal numbers of experts ask for unequal numbers of clusters.
    """
    wanted = {upcycler.num_clusters(number) for number in num_experts}
    if len(wanted) > 1:
        raise ValueError(
            f"upcycler {type(upcycler).__name__} divides the samples into one cluster for each expert, so all layers "
            f"of a part need the same num_experts, not {sorted(set(num_experts))}"
        )
    count = wanted.pop()
    generator = torch.Generator().manual_seed(seed)
    return [] if count == 1 else clusters_of_samples(stored, batches, count, generator)
