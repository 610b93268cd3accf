"""Routing watched while it trains: what every place with experts did between two log lines.

A row of `RoutingMeter.flush` has, under "layers", for each site ("2" is a decoder layer; "vision.3", "projector.0"):

    load                 f_e, share of the filled slots that expert e got; padding never counts
    max_violation        MaxVio = max_e f_e E - 1, largest load over the mean, minus 1 (2408.15664, section 4; there
                         for a batch, here for all batches of the interval); 0 is even, E / k - 1 the most
    load_cv              coefficient of variation of the load: standard deviation over mean (1701.06538, section 4)
    num_dead, dead       experts with f_e below `dead_share` / E, by default a tenth of an even share
    num_unused, unused   those among them without a single slot
    experts_per_token    filled slots of a token in the mean; K where no slot is ever empty
    without_expert       share of the tokens that no expert saw; only where there were some
    entropy              of the router's probabilities in nats: the mean over tokens of -sum_e p_e ln p_e; scores that
                         do not sum to 1 (ReLU gates) are divided by their sum, and a token without any counts 0
    entropy_share        entropy / ln E: 1 is a router without preference, 0 one without doubt; absent for one expert
    confidence           combine weight of a token's best slot, in the mean; by size where weights may be negative
    drop_rate            share of the slots that the capacity emptied; only where there is one
    image_tokens         share of the tokens that stand for pictures; always 1 outside the decoder
    image_share          for each expert, the share of its slots that are such tokens (null for one without slots); only
                         in the decoder, where ids tell them apart

and beside "layers", `without_gradient` names the balance terms that nothing learns from, where there are any.

Where every token fills a slot of every expert (dense routers), counting slots says nothing: load, what follows from it
and image_share are then by the router's probability instead of by slots. Expert choice is even by construction, so
`without_expert`, `entropy` and `image_share` are what it shows. Soft MoE assigns no tokens and has no row.

Everything is summed on the device, in one tensor for the layers of a kind; the host waits once, in `flush`.
Shapes: L layers of one kind, T tokens, E experts, K slots of a token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llava_moe.moe import Routing, RoutingContext, RoutingScope, SiteKey
from llava_moe.moe.capacity import DROPPED

_CHUNK = 2**22  # values of the probabilities that are worked on at a time: 16 MiB, few launches for small layers
_TEXT, _IMAGE, _PADDING = range(3)
_SCALARS = ("tokens", "entropy", "confidence", "without_expert", "dropped")
_TINY = 1e-20  # of a sum of scores; less is no preference at all
_DIGITS = 5


def site_name(site: SiteKey) -> str:
    """The index alone for a decoder layer; "vision.3" and "projector.0" elsewhere."""
    part, layer = site
    return str(layer) if part == "decoder" else f"{part}.{layer}"


@dataclass(frozen=True)
class _Kind:
    """What layers must share to be measured together."""

    part: str
    num_tokens: int
    num_slots: int
    num_experts: int
    has_images: bool
    has_drops: bool


class RoutingMeter:
    """Sums the parts of the objective and what the routers did between two log lines; nothing waits for the host.

    Args:
        every: of the micro-batches, the routing of every N-th is measured, the first after a log line always;
            0 measures none. The parts of the objective are summed in each.
        images: whether image tokens are told from text.
        dead_share: an expert is dead below this share of an even load.
    """

    def __init__(self, every: int = 1, images: bool = True, dead_share: float = 0.1) -> None:
        self.every = every
        self.images = images
        self.dead_share = dead_share
        self._start()

    def _start(self) -> None:
        self._updates = self._sampled = 0
        self._parts: dict[str, Tensor] = {}
        self._sums: dict[tuple[_Layout, tuple[SiteKey, ...]], Tensor] = {}
        self._stuck: set[str] = set()

    @torch.no_grad()
    def update(
        self,
        parts: Mapping[str, Tensor],
        routings: Mapping[SiteKey, Routing],
        scope: RoutingScope,
        terms: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Takes one micro-batch.

        Args:
            parts: of the objective, scalars.
            routings: of its forward, by site.
            scope: the one that these routings were recorded in.
            terms: the balance terms with their graph, to see whether they can move anything.
        """
        measured = self.every > 0 and self._updates % self.every == 0
        self._updates += 1
        for name, value in parts.items():
            _add(self._parts, name, value.detach().float())
        self._stuck |= {name for name, term in (terms or {}).items() if not term.requires_grad}
        if measured:
            self._sampled += 1
            for kind, sites in self._kinds(routings, scope).items():
                rows = _measure(kind, [routings[site] for site in sites], scope.context_of(sites[0]))
                _add(self._sums, (_Layout.of(kind), tuple(sites)), rows)

    def _kinds(self, routings: Mapping[SiteKey, Routing], scope: RoutingScope) -> dict[_Kind, list[SiteKey]]:
        found: dict[_Kind, list[SiteKey]] = {}
        for site, routing in routings.items():
            num_tokens, num_slots = routing.index_TK.shape
            told = self.images and site[0] == "decoder" and scope.context_of(site).modality_T is not None
            kind = _Kind(site[0], num_tokens, num_slots, routing.num_experts, told, DROPPED in routing.extras)
            found.setdefault(kind, []).append(site)
        return found

    def flush(self) -> dict[str, Any]:
        """Means over updates and ranks since the last call, as one row of the log; every rank must call it, and all
        must have run the same layers."""
        sites = self._by_site()
        sums = [*self._parts.values(), *(row for _, row in sites.values())]
        values = iter(_over_ranks(sums))
        world = dist.get_world_size() if dist.is_initialized() else 1
        count = max(self._updates * world, 1)
        row: dict[str, Any] = {name: next(values)[0] / count for name in self._parts}
        if self._stuck:
            row["without_gradient"] = sorted(self._stuck)
        if sites:
            row["layers"] = {
                site_name(site): _layer_row(layout, next(values), self.dead_share)
                for site, (layout, _) in sites.items()
            }
        self._start()
        return row

    def _by_site(self) -> dict[SiteKey, tuple[_Layout, Tensor]]:
        """The sums of each site, in the order of the sites, which all ranks share."""
        found: dict[SiteKey, tuple[_Layout, Tensor]] = {}
        for (layout, sites), rows in self._sums.items():
            for site, row in zip(sites, rows.unbind(), strict=True):
                found[site] = (layout, found[site][1] + row if site in found else row)
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class _Layout:
    """Where things lie in the sums of a layer: slots of text by expert, those of images, for routings with as many
    slots as experts the probabilities of both likewise, then `_SCALARS`, then image tokens."""

    part: str
    num_experts: int
    has_images: bool
    has_drops: bool
    has_weights: bool

    @staticmethod
    def of(kind: _Kind) -> _Layout:
        weights = kind.num_slots == kind.num_experts
        return _Layout(kind.part, kind.num_experts, kind.has_images, kind.has_drops, weights)


def _add(sums: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value


def _measure(kind: _Kind, routings: Sequence[Routing], context: RoutingContext) -> Tensor:
    """The sums of some layers over the tokens that they share, float32 (L, W); W as in `_Layout`."""
    mask_T = context.token_mask_T
    image_T = mask_T & context.modality_T.bool() if kind.has_images and context.modality_T is not None else None
    kind_T = torch.where(mask_T, _TEXT if image_T is None else image_T.long(), _PADDING)
    real_T = mask_T.float()
    num_images = real_T.sum() if image_T is None else image_T.sum().float()
    size = max(1, _CHUNK // max(kind.num_tokens * kind.num_experts, 1))
    chunks = [_chunk(kind, routings[i : i + size], kind_T, real_T, num_images) for i in range(0, len(routings), size)]
    return torch.cat(chunks)


def _chunk(kind: _Kind, routings: Sequence[Routing], kind_T: Tensor, real_T: Tensor, num_images: Tensor) -> Tensor:
    num_layers, num_experts = len(routings), kind.num_experts
    index_LTK = torch.stack([r.index_TK for r in routings])
    # One bin for each layer, kind of token and expert, with one more expert for the empty slots. scatter_add does not
    # make the host wait, bincount would.
    layer_L = torch.arange(num_layers, device=index_LTK.device) * 3
    start_LT = (layer_L.unsqueeze(1) + kind_T) * (num_experts + 1)
    bins = torch.zeros(num_layers * 3 * (num_experts + 1), dtype=torch.float32, device=index_LTK.device)
    place = (index_LTK + start_LT.unsqueeze(-1)).reshape(-1)
    bins.scatter_add_(0, place, torch.ones((), device=place.device).expand(place.shape))
    slots_L2E = bins.view(num_layers, 3, num_experts + 1)[:, :_PADDING, :num_experts]
    probs_LTE = torch.stack([r.probs_TE for r in routings]).float()
    probs_LTE = probs_LTE / probs_LTE.sum(-1, keepdim=True).clamp(min=_TINY)
    tokens_L4T = torch.stack(
        [
            torch.ones_like(probs_LTE[..., 0]),
            torch.special.entr(probs_LTE).sum(-1),
            torch.stack([r.weight_TK for r in routings]).float().abs().amax(-1),
            (index_LTK.amin(-1) == num_experts).float(),
        ],
        dim=1,
    )
    found = [slots_L2E.flatten(1)]
    if kind.num_slots == num_experts:
        image_T = (kind_T == _IMAGE).float()
        of_all_LE, of_images_LE = ((probs_LTE * m.unsqueeze(-1)).sum(1) for m in (real_T, image_T))
        found += [of_all_LE - of_images_LE, of_images_LE]
    found.append((tokens_L4T * real_T).sum(-1))
    if kind.has_drops:
        dropped_L = (torch.stack([r.extras[DROPPED] for r in routings]) * real_T).sum(-1)
    else:
        dropped_L = real_T.new_zeros(num_layers)
    found.append(torch.stack([dropped_L, num_images.expand(num_layers)], dim=1))
    return torch.cat(found, dim=1)


def _over_ranks(sums: Sequence[Tensor]) -> Iterable[list[float]]:
    """Each tensor summed over the ranks, as numbers: one collective and one wait for all of them."""
    if not sums:
        return []
    device = sums[-1].device
    flat = torch.cat([tensor.reshape(-1).to(device) for tensor in sums])
    if dist.is_initialized():
        dist.all_reduce(flat)
    numbers = iter(flat.tolist())
    return [list(itertools.islice(numbers, tensor.numel())) for tensor in sums]


def _layer_row(layout: _Layout, values: Sequence[float], dead_share: float) -> dict[str, Any]:
    """The numbers of one layer; see the head of this file."""
    count, numbers = layout.num_experts, iter(values)
    text, image = (list(itertools.islice(numbers, count)) for _ in range(2))
    weights = [list(itertools.islice(numbers, count)) for _ in range(2)] if layout.has_weights else None
    scalars = dict(zip((*_SCALARS, "image_tokens"), numbers, strict=True))
    tokens, slots = scalars["tokens"], sum(text) + sum(image)
    if weights is not None and slots > 0.9999 * tokens * count:
        text, image = weights
    loads = [a + b for a, b in zip(text, image, strict=True)]
    total = sum(loads)
    share = [v / total if total else 0.0 for v in loads]
    dead = [e for e in range(count) if share[e] < dead_share / count]
    unused = [e for e in dead if share[e] == 0]
    row: dict[str, Any] = {"load": _rounded(share), "max_violation": _rounded(max(share) * count - 1 if total else 0.0)}
    row["load_cv"] = _rounded(math.sqrt(max(count * sum(s * s for s in share) - 1, 0.0)))
    row |= {"num_dead": len(dead), "num_unused": len(unused)}
    row |= {name: which for name, which in (("dead", dead), ("unused", unused)) if which}
    row["experts_per_token"] = _rounded(slots / max(tokens, 1))
    row["entropy"] = _rounded(scalars["entropy"] / max(tokens, 1))
    if count > 1:
        row["entropy_share"] = _rounded(scalars["entropy"] / max(tokens, 1) / math.log(count))
    row["confidence"] = _rounded(scalars["confidence"] / max(tokens, 1))
    if scalars["without_expert"]:
        row["without_expert"] = _rounded(scalars["without_expert"] / tokens)
    if layout.has_drops:
        row["drop_rate"] = _rounded(scalars["dropped"] / max(scalars["dropped"] + slots, 1))
    if layout.part != "decoder":
        row["image_tokens"] = 1.0
    elif layout.has_images:
        row["image_tokens"] = _rounded(scalars["image_tokens"] / max(tokens, 1))
        row["image_share"] = [_rounded(i / v) if v else None for i, v in zip(image, loads, strict=True)]
    return row


def _rounded(value: Any) -> Any:
    return [round(v, _DIGITS) for v in value] if isinstance(value, list) else round(value, _DIGITS)
