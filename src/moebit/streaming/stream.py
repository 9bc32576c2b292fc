"""Hidden states of token windows on their way through the decoder layers, one layer at a time.

Only one layer's non-expert weights are in memory at a time, and its experts chunk by chunk: first the layer runs with experts that
return zero and note what they were asked, then the experts are computed chunk by chunk over all noted tokens, then the layer runs
again with their stored outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from moebit.model.embeddings import materialize_embeddings, named_tokens
from moebit.model.experts import SLOTS, RoutedTokens, add_outputs, dispatch, experts_names, read_experts
from moebit.model.layer_call import LayerCall, StopForward, same_arguments, same_or_known
from moebit.model.replay import head, record
from moebit.model.seam import ExpertsHandler, experts_handler
from moebit.model.skeleton import dematerialize, materialize, place_buffers
from moebit.model.structure import Structure
from moebit.ranks import ALONE, Named, Ranks
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.files import Entry
from moebit.streaming.shortcut import KeptInput, adds_up, watched
from moebit.streaming.store import ActivationStore
from moebit.streaming.watch import InputHook, Noted, Watch, answering, recorded, tell

BATCH_TOKENS = 4096
LOGIT_BYTES = 64 * 2**20


@dataclass
class Stream:
    """Windows of tokens between two decoder layers.

    Attributes:
        checkpoint, structure: the model the windows run through.
        windows: int64 [N, L] token ids.
        hidden: [N, L, ...] states before the next layer, in the type that the skeleton computes in.
        store: where activations live.
        batch_tokens: tokens that run through a layer at a time (at least one window).
        slots: routed slots that run through experts at a time.
        ranks: whose forwards are shared out: a batch runs on one rank, and all ranks get what comes of it.
    """

    checkpoint: Checkpoint
    structure: Structure
    windows: Tensor
    store: ActivationStore = field(default_factory=ActivationStore)
    batch_tokens: int = BATCH_TOKENS
    slots: int = SLOTS
    ranks: Ranks = ALONE
    hidden: Tensor = field(init=False)
    _calls: list[list[LayerCall]] = field(init=False, default_factory=list)
    _watches: list[Watch] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        model = self.checkpoint.model
        self.windows = self.windows.to(self.device)
        place_buffers(model, self.device)
        front, watch = [(name, model.get_submodule(name)) for name in self.structure.front], None
        for name, module in front:
            if module is model.get_input_embeddings():
                watch = materialize_embeddings(module, name, self.checkpoint.weights, self.windows, named_tokens(self.checkpoint.config))
            else:
                materialize(module, name, self.checkpoint.weights, recurse=False)
        for rows in self.batches():
            first, calls = record(model, self.structure.list_name, self.structure.returns, input_ids=self.windows[rows])
            if not rows.start:  # some models stream several states per token: [N, L, streams, H]
                self.hidden = self.store.allocate((len(self.windows), *first.shape[1:]), self.dtype)
            self.hidden[rows] = first
            self._calls.append(self._shared(calls))
            self.store.release()
        if watch is not None:
            watch.remove()
        for _, module in front:
            dematerialize(module, recurse=False)

    def handed_on(self) -> dict[str, Tensor]:
        """What layers handed on beside the hidden states and later ones still want; with the hidden states, all that going on needs."""
        own = list(enumerate(self._calls))[self.ranks.rank :: self.ranks.size]
        mine = {f"{b}.{name}": value for b, calls in own for name, value in calls[0].carried.tensors().items()}
        found = {name: value for group in self.ranks.everyone(mine) for name, value in group.items()}
        return dict(sorted(found.items(), key=lambda item: int(item[0].partition(".")[0])))

    def take_up(self, state: Mapping[str, Entry]) -> None:
        """Go on from a saved state, of which the hidden states are read a few windows at a time."""
        for rows in self.batches():
            self.hidden[rows] = state["hidden"].read(rows.start, rows.stop).to(self.device)
            self.store.release()
        for b, calls in enumerate(self._calls):
            mine = {name.partition(".")[2]: entry.read().to(self.device) for name, entry in state.items() if name.startswith(f"{b}.")}
            calls[0].carried.restore(mine)

    @property
    def device(self) -> torch.device:
        """Where layers are computed, and where activations live."""
        return self.checkpoint.weights.device

    @property
    def dtype(self) -> torch.dtype:
        """What layers are computed in."""
        dtype: torch.dtype = self.checkpoint.model.dtype
        return dtype

    @property
    def batch_windows(self) -> int:
        """Windows of a batch; the last batch may have fewer."""
        return max(1, self.batch_tokens // self.windows.shape[1])

    def batches(self) -> Iterator[slice]:
        step = self.batch_windows
        for start in range(0, len(self.windows), step):
            yield slice(start, min(start + step, len(self.windows)))

    def _shared(self, calls: list[LayerCall]) -> list[LayerCall]:
        """The calls of a further batch, whose tensors that equal the first batch's (masks, positions) are stored once."""
        if not self._calls:
            return calls
        return [same_arguments(mine, known, same_or_known) for mine, known in zip(calls, self._calls[0], strict=True)]

    @property
    def hands_on(self) -> bool:
        """Whether layers hand on anything beside the hidden states."""
        return any(call.hands_on for calls in self._calls for call in calls)

    def call(self, index: int) -> LayerCall:
        """How a layer is called for the first batch."""
        return self._calls[0][index]

    def layer(self, index: int) -> nn.Module:
        return self.checkpoint.model.get_submodule(self.structure.layers[index].name)

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """One decoder layer with its non-expert weights in memory, freed afterwards."""
        sites, layer = self.structure.layers[index], self.layer(index)
        experts = [layer.get_submodule(sites.moe.experts)] if sites.moe else []
        materialize(layer, sites.name, self.checkpoint.weights, skip=experts)
        try:
            yield layer
        finally:
            dematerialize(layer)

    @torch.no_grad()
    def run(
        self,
        index: int,
        experts: Callable[[slice], ExpertsHandler] | None = None,
        inputs: Mapping[str, InputHook] | None = None,
        advance: bool = False,
        outputs: Tensor | None = None,
        done: int = 0,
        stop: int | None = None,
        noted: Noted | None = None,
    ) -> None:
        """Run one (loaded) layer over all windows.

        Args:
            experts: the experts' handler for the windows of a batch; needed where the run reaches experts.
            inputs: what to do with the input of a submodule, by its name in the layer. If given without `advance`, each forward
                stops as soon as all of them have been called.
            advance: replace the hidden states by the layer's output.
            outputs: [N, L, ...]: put the layer's output there instead.
            done: batches to leave out, from the first. stop: the batch to stop before.
            noted: gets what the experts' handler has put there in each forward.
        """
        layer = self.layer(index)
        watches = [*self._watches, *(Watch(name, hook, stops=not advance) for name, hook in (inputs or {}).items())]

        def forward(number: int, rows: slice) -> dict[str, Tensor]:
            seen: dict[str, Tensor] = {}
            with ExitStack() as stack:
                stack.enter_context(recorded(layer, watches, seen))
                if experts is not None:
                    stack.enter_context(experts_handler(experts(rows)))
                with suppress(StopForward):
                    seen["output"] = self._calls[number][index].run(layer, self.hidden[rows], keep=advance)
            if noted is not None:
                seen |= noted.taken()
            return seen

        def take(rows: slice, seen: Named) -> None:
            tell(watches, seen)
            if noted is not None and "ids" in seen:
                noted.put(self.token_span(rows), seen)
            into = self.hidden if advance else outputs
            if into is not None and "output" in seen:
                into[rows] = seen["output"]
            self.store.release()

        self.ranks.share_out(list(self.batches()), forward, take, done=done, stop=stop)

    @contextmanager
    def watching(self, names: Iterable[str], note: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Tell `note` what enters modules of the layers that run inside this context, batch after batch.

        Args:
            names: of modules inside the layer. note: called with a module's name and [rows, channels] of the first tensor it is given.
        """
        before = self._watches
        self._watches = [*before, *(Watch(name, partial(note, name), rows=True) for name in names)]
        try:
            yield
        finally:
            self._watches = before

    def some(self, index: int, windows: Tensor, experts: ExpertsHandler) -> Tensor:
        """Return [n, L, ...] what one (loaded) layer puts out for some windows of one batch; gradients flow where they are enabled.

        Args:
            windows: int64 [n], rising numbers, all within one of `batches()`.
            experts: the experts' handler.
        """
        size = self.batch_windows
        batch = int(windows[0]) // size
        call = self._calls[batch][index].some(windows - batch * size, min(size, len(self.windows) - batch * size))
        with experts_handler(experts):
            return call.run(self.layer(index), self.hidden[windows])

    def pull_back(self, index: int, entered: Tensor, gradient: Tensor, experts: Callable[[slice], ExpertsHandler] | None = None) -> Tensor:
        """Return the gradient with respect to the input of one (loaded) layer, [N, L, H] float32.

        Args:
            entered: [N, L, H] what entered the layer.
            gradient: [N, L, H] with respect to the layer's output.
            experts: a differentiable handler for the windows of a batch; needed where the layer has experts.
        """
        found = torch.empty(entered.shape, dtype=torch.float32)
        for rows, calls in zip(self.batches(), self._calls, strict=True):
            with ExitStack() as stack:
                stack.enter_context(torch.enable_grad())
                if experts is not None:
                    stack.enter_context(experts_handler(experts(rows)))
                hidden = entered[rows].detach().clone().requires_grad_()
                output = calls[index].run(self.layer(index), hidden)
                (mine,) = torch.autograd.grad(output, hidden, gradient[rows].to(output.dtype))
            found[rows] = mine.float()
            self.store.release()
        return found

    @torch.no_grad()
    def capture_routing(self, index: int, outputs: Tensor | None = None, kept: KeptInput | None = None) -> RoutedTokens:
        """What the layer's experts are asked: the routed tokens, in the order of the windows.

        Args:
            outputs: [N, L, ...], gets what the layer puts out where its experts put out nothing.
            kept: what enters a linear (attention's last); where the layer can begin behind the module around it, that is not run again.
        """
        moe = self.structure.layers[index].moe
        assert moe is not None
        total = self.windows.numel()
        x = self.store.allocate((total, moe.layout.hidden), self.dtype)
        ids = torch.empty(total, moe.top_k, dtype=torch.int64)
        weights = torch.empty(total, moe.top_k, dtype=torch.float32)

        noted = Noted(x, ids, weights)

        def note(rows: slice) -> ExpertsHandler:
            return noted.handler

        if kept is None or self.ranks.size > 1 or len(self._calls) == 1 or any(calls[index].hands_on for calls in self._calls):
            self.run(index, experts=note, outputs=outputs, noted=noted)
        else:
            self._run_behind(index, kept, note, noted, outputs)
        return RoutedTokens(x, ids, weights)

    def _run_behind(
        self, index: int, kept: KeptInput, experts: Callable[[slice], ExpertsHandler], noted: Noted, outputs: Tensor | None
    ) -> None:
        """`run` over all windows, from a linear on whose inputs were kept: where the first batch gives the same, bit for bit, either way.

        Args:
            noted: what `experts` notes.
        """
        layer, first = self.layer(index), next(self.batches())

        def inputs(rows: slice) -> Tensor:
            return kept.values[self.token_span(rows)].unflatten(0, (-1, self.windows.shape[1]))

        with watched(layer, kept) as seen:
            self.run(index, experts=experts, outputs=outputs, stop=1, noted=noted)
        short = seen.stand_in(layer, kept, inputs(first))
        if short is None:
            self.run(index, experts=experts, outputs=outputs, done=1, noted=noted)
            return

        def answered(rows: slice) -> ExpertsHandler:
            short.values = inputs(rows)
            return experts(rows)

        results = [tensor[self.token_span(first)] for tensor in (noted.x, noted.ids, noted.weights) if tensor is not None]
        results += [] if outputs is None else [outputs[first]]
        wanted = [result.clone() for result in results]
        with short.in_place(layer, kept.block):
            self.run(index, experts=answered, outputs=outputs, stop=1, noted=noted)
            same = all(map(torch.equal, results, wanted))
            if same:
                self.run(index, experts=answered, outputs=outputs, done=1, noted=noted)
        if not same:
            self.run(index, experts=experts, outputs=outputs, noted=noted)

    def token_span(self, rows: slice) -> slice:
        length = self.windows.shape[1]
        return slice(rows.start * length, rows.stop * length)

    def replay(self, outputs_TH: Tensor) -> Callable[[slice], ExpertsHandler]:
        """Handlers that answer with stored expert outputs."""
        return lambda rows: lambda module, states, ids, weights: outputs_TH[self.token_span(rows)].to(states.dtype)

    @torch.no_grad()
    def advance_by(self, index: int, outputs_TH: Tensor, without: Tensor | None) -> None:
        """Advance through a layer whose experts put out `outputs_TH`.

        Most layers end in `hidden + experts' outputs`. Where the first batch shows that this one does, the others are added up from what
        `capture_routing` stored, and attention is spared a pass; else the layer runs again.

        Args:
            without: [N, L, ...] outputs of the layer as it is now, but with experts that put out nothing; None where there are none.
        """
        first = next(iter(self.batches()))
        simple = not any(calls[index].hands_on for calls in self._calls)
        if without is None or not simple or self.hidden[0, 0].numel() != outputs_TH.shape[1]:
            self.run(index, experts=self.replay(outputs_TH), advance=True)
            return

        def added(rows: slice) -> Tensor:
            return outputs_TH[self.token_span(rows)].view(without[rows].shape)

        self.run(index, experts=self.replay(outputs_TH), advance=True, stop=1)
        if not adds_up(self.hidden[first], without[first], added(first)):
            self.run(index, experts=self.replay(outputs_TH), advance=True, done=1)
            return

        def sum_up(number: int, rows: slice) -> Named:
            return {"hidden": (without[rows].float() + added(rows)).to(self.dtype)}

        def take(rows: slice, found: Named) -> None:
            self.hidden[rows] = found["hidden"]
            self.store.release()

        self.ranks.share_out(list(self.batches()), sum_up, take, done=1)

    def step(self, index: int, chunk: int) -> Tensor | None:
        """Advance through one layer as it is, with at most `chunk` experts in memory; returns the chosen experts [T, k].

        Where all of a layer's experts fit, one pass does; else the layer runs twice around the experts.
        """
        moe = self.structure.layers[index].moe
        with self.loaded(index) as layer:
            if moe is None:
                self.run(index, advance=True)
                return None
            name, module = f"{self.structure.layers[index].name}.{moe.experts}", layer.get_submodule(moe.experts)
            if chunk >= moe.layout.experts:
                weights = read_experts(self.checkpoint.weights, name, moe.layout, 0, moe.layout.experts, self.dtype)
                noted = Noted(None, torch.empty(self.windows.numel(), moe.top_k, dtype=torch.int64), None)
                answer = answering(weights, self.slots, noted)
                self.run(index, experts=lambda rows: answer, advance=True, noted=noted)
                return noted.ids
            routed = self.capture_routing(index)
            outputs = self.new_outputs(routed)
            slots = dispatch(routed.ids, routed.weights, moe.layout.experts)
            for start in range(0, moe.layout.experts, chunk):
                stop = min(start + chunk, moe.layout.experts)
                self.checkpoint.weights.expect(experts_names(name, moe.layout), stop, min(stop + chunk, moe.layout.experts))
                weights = read_experts(self.checkpoint.weights, name, moe.layout, start, stop, self.dtype)
                for piece in slots.pieces(start, stop, self.slots):
                    add_outputs(module, routed.x, weights, piece, outputs)
                    self.store.release()
            self.run(index, experts=self.replay(outputs), advance=True)
            return routed.ids

    def new_outputs(self, routed: RoutedTokens) -> Tensor:
        """[T, H] float32 zeros for the experts' outputs to be added to."""
        outputs = self.store.allocate(tuple(routed.x.shape), torch.float32).zero_()
        self.store.release()
        return outputs

    @torch.no_grad()
    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, logits [B, L, V] float32) after the last layer, a few windows at a time."""
        model = self.checkpoint.model
        layers, returns = self.structure.list_name, self.structure.returns
        behind = [(name, model.get_submodule(name)) for name in self.structure.back]
        vocabulary = int(self.checkpoint.config.get_text_config().vocab_size)
        step = max(1, LOGIT_BYTES // (4 * vocabulary * self.windows.shape[1]))
        try:
            for name, module in behind:
                materialize(module, name, self.checkpoint.weights, recurse=False)
            for start in range(0, len(self.windows), step):
                rows = slice(start, min(start + step, len(self.windows)))
                yield rows, head(model, layers, self.hidden[rows], returns).float()
        finally:
            for _, module in behind:
                dematerialize(module, recurse=False)
