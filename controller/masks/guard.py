"""The guard: keeps pruned elements zero while others train, load, convert and replace the weights.

One controller has one guard. It sees

- **gradients** as they have been accumulated, before clipping, a reducer or another hook can; on
  a GPU all of a backward pass at once, at its end, unless somebody may look before;
- **optimisers** before and after each step (``optimizers.py``). A step by what is no
  ``torch.optim.Optimizer`` is made good at the next ``scheduler.step()``;
- **loads**: what a checkpoint has where a mask prunes is kept for masks that come later;
- **replaced parameters**, as they are registered;
- **forward passes of training**, on the host: a weight that was written since the last step is
  zero again before it is used. Evaluation sees a merged adapter's effect.

What a step costs, for 8 billion bfloat16 parameters in blocks of 64 at 80 %: the pruned part of
the gradients is written once, 0.8 x 16 GB, in one launch; under an elementwise optimiser, as
AdamW, nothing else. Another optimiser costs as much again, for the weights. The moments are
cleared once an update, not a step. Nothing is done in a forward pass but comparing numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from ...kernels.launch import takes_kernels
from .exchange import pieces_here, sums_of_all
from .linear import list_blocks_of_shards, note_adapter
from .optimizers import keeps_zeros, moments, parameters_of, rows_of_others, start_returned
from .shards import is_sharded
from .weight import GradientTaker, SparseWeight, clear_, drop_foreign, leaks, take_values


class Guard:
    """Keeps the zeros of some weights of one model, from creation until ``release``."""

    def __init__(self, model: nn.Module, weights: Sequence[SparseWeight]) -> None:
        self.weights = list(weights)
        self.users = [(*place, weight) for weight in weights for place in weight.target.users]
        self.released = False
        self.began = False  # until training begins a state may be loaded, whose masks are others
        # told which weights an optimiser is about to step, with their gradients, and what a
        # gradient scaler has told the optimiser
        self.before_step: Callable[[list[SparseWeight], Tensor | None], None] | None = None
        # told which optimiser, of whatever parameters, has stepped
        self.after_step: Callable[[Optimizer], object] | None = None
        # where the weights' modules are in the model
        self.paths = {id(module): path for path, module in model.named_modules()}
        self._weight_at = {(id(module), name): weight for module, name, weight in self.users}
        self._gradient_hooks: dict[SparseWeight, RemovableHandle] = {}
        self._pending: dict[int, list[SparseWeight]] = {}  # by backward pass, cleared at its end
        # over how many ranks a reducer averages the gradients of the last forward pass, and the
        # backward passes whose dense gradients are waited for
        self._reduced_over = 0
        self._awaiting: set[int] = set()
        self._cleared_gradients: dict[SparseWeight, int] = {}  # by identity, since the last step
        # of each optimiser the moments that are clear, and of which change of the mask
        self._cleared: weakref.WeakKeyDictionary[Optimizer, dict[SparseWeight, tuple[int, ...]]]
        self._cleared = weakref.WeakKeyDictionary()
        self._regrown: set[SparseWeight] = set()  # since their last step
        self._stepping: set[SparseWeight] = set()  # what an optimiser is at work on
        self._stepped: set[SparseWeight] = set()
        self._handles = [model.register_forward_pre_hook(_ModuleHook(self, "before_forward"))]
        self._names_in: dict[int, tuple[str, ...]] = {}
        for module in dict.fromkeys(module for module, _, _ in self.users):
            names = tuple(name for owner, name, _ in self.users if owner is module)
            self._names_in[id(module)] = names
            hook = _ModuleHook(self, "after_load")
            self._handles.append(module.register_load_state_dict_post_hook(hook))
        _hook_torch()
        _GUARDS[self] = None
        for parent in model.modules():
            for child in parent.children():
                note_adapter(parent, child)
        for weight in self.weights:
            self._watch_gradient(weight, weight.weight)
            weight.leave()

    def release(self) -> None:
        """Let go of model and weights."""
        self.released = True
        _GUARDS.pop(self, None)
        for handle in (*self._handles, *self._gradient_hooks.values()):
            handle.remove()
        self._handles.clear()
        self._gradient_hooks.clear()

    # the masks' owner tells

    def masks_changed(self) -> None:
        """Clear what known optimisers remember of elements that are pruned now."""
        for optimizer in list(self._cleared) if self.began else ():
            self._clear_moments(optimizer)

    def regrown(self, weights: Sequence[SparseWeight]) -> None:
        """Have what has come back in the masks start at the next step as ``start_returned``."""
        self._regrown.update(weights)

    def know(self, optimizer: Optimizer) -> None:
        """Take note of an optimiser before its first step."""
        self._cleared.setdefault(optimizer, {})

    def begin_step(self) -> None:
        """Make good what an optimiser that torch does not know has done to the weights."""
        self.begin_training()
        unseen = [w for w in self.weights if w not in self._stepped and w.follow().requires_grad]
        for weight in unseen:
            self._watch_gradient(weight, weight.weight)
        self._clear([w for w in unseen if w.holds_zeros])
        self._stepped.clear()

    @staticmethod
    def _clear(weights: Sequence[SparseWeight]) -> None:
        clear_(weights, [weight.weight for weight in weights])
        for weight in weights:
            weight.leave()

    def begin_training(self) -> None:
        """Let go of pruned values that nothing will ask for any more: no state is loaded now."""
        self.began = True
        for weight in self.weights:
            weight.values_are_loaded = False
            if not weight.keeps_values:
                weight.values = None

    # what torch tells

    def before_forward(self, model: nn.Module, _: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._list_late(model)
            over = ranks_of_reducer(model) if torch.is_grad_enabled() else None
            if over is not None:  # one rank alone may look at the model without its wrapper
                self._reduced_over = over
        if not (model.training and torch.is_grad_enabled()):
            return
        changed = []
        for weight in self.weights:
            parameter = weight.weight
            # what `torch.func.functional_call` puts in for the length of a call is the caller's
            if weight.knows(parameter) and not weight.is_clean(parameter):
                changed.append(weight)
                weight.follow()
                self._watch_gradient(weight, parameter)
        # LBFGS calls the model between the parts of a step, and nobody else is at work then
        self._clear([weight for weight in changed if weight in self._stepping])
        foreign = [weight for weight in changed if weight not in self._stepping]
        drop_foreign(foreign, "before a forward pass of training")

    def _list_late(self, model: nn.Module) -> None:
        """Bring lists of blocks in line where the model was parted when it was pruned already."""
        for weight in self.weights:
            if weight.skips_blocks and weight.shard is None and is_sharded(weight.weight):
                weight.follow()
        late = [(w, grid) for w in self.weights if (grid := w.unlisted) is not None]
        if late:
            list_blocks_of_shards(model, *zip(*late, strict=True))

    def after_load(self, module: nn.Module, _: Any) -> None:
        places = [(name, self._weight_at[id(module), name]) for name in self._names_in[id(module)]]
        loaded = [
            weight
            for name, weight in places
            # a load may leave some out, and one that assigns has gone by the registration
            if module._parameters.get(name) is weight.weight
            and not weight.is_as_left(weight.weight)
        ]
        for weight, written in zip(loaded, leaks(loaded)(), strict=True):
            if weight.values_are_loaded and not written:
                weight.leave()  # the model that goes with a state that was loaded before it
            else:
                take_values([weight], keep=True)

    def before_registration(self, module: nn.Module, name: str, parameter: Tensor | None) -> None:
        weight = self._weight_at.get((id(module), name))
        if weight is None or parameter is None or weight.module is not module:
            return
        # `module.weight *= 2` registers it anew; who took it out for a while puts it back
        if parameter is module._parameters.get(name) or weight.is_back(parameter):
            return
        weight.check_fits(parameter)
        if type(parameter) is nn.Parameter and parameter.device.type != "meta":
            weight.take_from(parameter)
            self._watch_gradient(weight, parameter)

    def after_registration(self, parent: nn.Module, child: nn.Module | None) -> None:
        """A module has a new place: PEFT wraps it, or has merged into it and unwraps it."""
        names = self._names_in.get(id(child), ())
        for name in names:
            self._weight_at[id(child), name].forget()
        if names and child is not None:
            note_adapter(parent, child)

    def after_accumulation(self, weight: SparseWeight, parameter: Tensor) -> None:
        gradient: Any = parameter.grad
        if gradient is not None and is_sharded(gradient):
            # an embedding's is parts of a sum: they are added up here, not as it is stepped by
            placed = parameter.placements  # pyright: ignore[reportAttributeAccessIssue]
            if gradient.placements != placed:
                parameter.grad = gradient = gradient.redistribute(placements=placed)
        if gradient is None or not weight.holds_zeros or not weight.clears(gradient):
            return
        if weight.mask.device != gradient.device:
            weight.follow()
        taker = self._taker_behind_reducer(weight)
        if taker is not None and gradient.layout == torch.strided:
            # what is about to be sent is the dense gradient: nobody needs to send it once more
            taker.join(gradient)
            self._cleared_gradients.pop(weight, None)
            backward = torch._C._current_graph_task_id()
            if backward not in self._awaiting:
                self._awaiting.add(backward)
                _at_end_of_backward(partial(self._after_reducer, backward, 2))
            return
        self._cleared_gradients[weight] = id(gradient)
        if gradient.layout == torch.sparse_coo:  # an embedding's: it lists the rows it is of
            rows, values = gradient._indices()[0], gradient._values()
            values.masked_fill_(~weight.binary_mask[rows], 0)
            return
        if weight.dense_gradient_taker is not None:
            weight.dense_gradient_taker.take(gradient)
        if not self.waits_for(parameter):
            weight.clear_(gradient)
            return
        backward = torch._C._current_graph_task_id()
        if backward not in self._pending:
            self._pending[backward] = []
            _at_end_of_backward(partial(self._clear_pending, backward))
        self._pending[backward].append(weight)

    def _taker_behind_reducer(self, weight: SparseWeight) -> GradientTaker | None:
        """Return who wants a gradient dense, if it is to be averaged as ``is_reduced`` says."""
        return weight.dense_gradient_taker if self.is_reduced(weight) else None

    def is_reduced(self, weight: SparseWeight) -> bool:
        """Tell whether ``DistributedDataParallel`` averages the gradients of a weight, as of the
        last forward pass that it made, over the very ranks that agree on the masks.
        """
        alike = 1 < self._reduced_over == weight.ranks.size
        return alike and not weight.in_parts and not weight.on_stage

    def _after_reducer(self, backward: int, further: int) -> None:
        """Take dense gradients that were averaged, and clear them. The reducer puts its own end
        behind the callbacks that are there, of a static graph twice: so this comes as late.
        """
        if further:
            _at_end_of_backward(partial(self._after_reducer, backward, further - 1))
            return
        self._awaiting.discard(backward)
        # also of weights that other ranks alone have used
        for weight in self.weights:
            taker, gradient = self._taker_behind_reducer(weight), weight.weight.grad
            if taker is not None and gradient is not None and gradient.layout == torch.strided:
                taker.take(gradient, averaged=True)
                weight.clear_(gradient)

    @staticmethod
    def waits_for(parameter: Tensor) -> bool:
        """Tell whether a gradient may be cleared at the end of the backward pass, with the others.

        Not on a CPU, where launches cost nothing and the gradient is still in the cache; nor where
        another hook, or the reducer of ``DistributedDataParallel``, looks at each as it arrives.
        """
        if not takes_kernels(parameter.device):
            return False
        others = len(parameter._post_accumulate_grad_hooks or ()) > 1
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        return not others and not ranks

    def _clear_pending(self, backward: int) -> None:
        pending = self._pending.pop(backward, [])
        found = [(w, g) for w in pending if (g := w.weight.grad) is not None]
        clear_([weight for weight, _ in found], [gradient for _, gradient in found])

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        members = self._members(optimizer)
        if not members:
            return
        self.begin_training()
        changed = [weight for weight in members if not weight.is_clean(weight.weight)]
        if changed:
            drop_foreign(changed, "before an optimiser's step")
        self._clear_assigned_gradients(members)
        self._clear_moments(optimizer, members)
        if self.before_step is not None:
            self.before_step(members, getattr(optimizer, "found_inf", None))
        self._start_returned(optimizer, members)
        self._stepping.update(members)

    def _clear_assigned_gradients(self, members: Sequence[SparseWeight]) -> None:
        """Clear gradients that no backward pass has brought, and watch for those to come."""
        found = []
        for weight in members:
            gradient, seen = weight.weight.grad, self._cleared_gradients.pop(weight, None)
            if gradient is not None and id(gradient) != seen:
                self._watch_gradient(weight, weight.weight)
                found.append((weight, gradient))
        # a backward pass that has failed left some behind
        left = [weight for rest in self._pending.values() for weight in rest]
        found += [(w, g) for w in left if (g := w.weight.grad) is not None]
        self._pending.clear()
        self._awaiting.clear()
        clear_([weight for weight, _ in found], [gradient for _, gradient in found])

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        members = self._members(optimizer)
        if not keeps_zeros(optimizer):
            clear_(members, [weight.weight for weight in members])
        for weight in members:
            weight.leave()
        self._stepping.clear()
        self._stepped.update(members)
        if self.after_step is not None:
            self.after_step(optimizer)

    def _members(self, optimizer: Optimizer) -> list[SparseWeight]:
        # of a weight that is gone the model itself will tell
        ours = {
            id(weight.weight): weight  # of one that FSDP2 has gathered its shard
            for weight in self.weights
            if weight.holds_zeros and weight.is_in_module
        }
        return [ours[id(p)] for p in parameters_of(optimizer) if id(p) in ours]

    def _clear_moments(
        self, optimizer: Optimizer, members: Sequence[SparseWeight] | None = None
    ) -> None:
        """Clear moments of what was pruned since this was last done, and moments put in anew."""
        done = self._cleared.setdefault(optimizer, {})
        members = self._members(optimizer) if members is None else members
        here = {weight: list(moments(optimizer, weight.weight)) for weight in members}
        keys = {w: (w.changes, *(m.data_ptr() for m in here[w])) for w in members}
        due = [(w, moment) for w in members if done.get(w) != keys[w] for moment in here[w]]
        clear_([weight for weight, _ in due], [moment for _, moment in due])
        done.update(keys)

    def _start_returned(self, optimizer: Optimizer, members: Sequence[SparseWeight]) -> None:
        found = [w for w in members if w in self._regrown and w.weight.grad is not None]
        # a gradient scaler lets a fused optimiser skip the step itself
        overflowed = getattr(optimizer, "found_inf", None)
        if not found or (overflowed is not None and bool(overflowed)):
            return
        asked = []
        for weight in found:
            if not weight.all_kept:
                kept = weight.like_weight(weight.kept_elements())
                rows = rows_of_others(optimizer, weight.weight, kept, pieces_here(weight))
                asked += [(weight, rows)] if rows else []
        if asked:
            weights, rows = zip(*asked, strict=True)
            for weight, sums in zip(weights, sums_of_all(weights, rows), strict=True):
                kept = weight.like_weight(weight.kept_elements())
                start_returned(optimizer, weight.weight, kept, sums)
        self._regrown.difference_update(found)

    def _watch_gradient(self, weight: SparseWeight, parameter: Tensor) -> None:
        """Hang the gradient's hook on ``parameter``, before all others, if it is not there."""
        if not (parameter.requires_grad and parameter.is_leaf):
            return
        if (held := self._gradient_hooks.get(weight)) is not None:
            held.remove()
        handle = parameter.register_post_accumulate_grad_hook(_AfterAccumulation(self, weight))
        # torch walks the dictionary by insertion, whatever `move_to_end` has said
        hooks = parameter._post_accumulate_grad_hooks
        others = {key: other for key, other in hooks.items() if key != handle.id}
        for key in others:
            del hooks[key]
        hooks.update(others)
        # `swap_tensors` leaves the dictionary with the name, and not with the tensor
        parameter._post_accumulate_grad_hooks = hooks
        self._gradient_hooks[weight] = handle


def ranks_of_reducer(model: nn.Module) -> int | None:
    """Return over how many ranks ``DistributedDataParallel`` averages the gradients of a forward
    pass of a model, which it is or has around it; 0: of this pass it does not; None: no such
    wrapper makes this pass.
    """
    wrapper = nn.parallel.DistributedDataParallel
    # torch's own for its compiler; without it ranks average gradients themselves
    around = getattr(wrapper, "_get_active_ddp_module", lambda: None)
    found: Any = model if isinstance(model, wrapper) else around()
    if found is None:
        return None
    if not found.require_backward_grad_sync:
        return 0
    if getattr(found, "_use_python_reducer", True):  # its hooks come with compiled autograd
        return 0
    return found.process_group.size()


def _at_end_of_backward(do: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(do)


def guards_of(module: nn.Module, parameter_name: str) -> list[Guard]:
    """List the guards that have this weight under a mask: one, or none."""
    hooks = module._load_state_dict_post_hooks.values()
    guards = [hook.guard for hook in hooks if isinstance(hook, _ModuleHook)]
    return [guard for guard in guards if (id(module), parameter_name) in guard._weight_at]


class _AfterAccumulation:
    # weakly: torch holds a tensor's hooks where the garbage collector cannot see the circle
    def __init__(self, guard: Guard, weight: SparseWeight) -> None:
        self._guard = weakref.ref(guard)
        self._weight = weakref.ref(weight)

    def __call__(self, parameter: Tensor) -> None:
        guard, weight = self._guard(), self._weight()
        if guard is not None and weight is not None:
            guard.after_accumulation(weight, parameter)


class _ModuleHook:
    """A hook on a module. In a copy or a pickle of the module, which no controller has under its
    masks, it becomes a method of the standard library that takes anything and does nothing.
    """

    def __init__(self, guard: Guard, method: str) -> None:
        self.guard = guard
        self._method = method

    def __call__(self, module: nn.Module, more: Any) -> None:
        if not torch.compiler.is_compiling():
            getattr(self.guard, self._method)(module, more)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def drop_remains(model: nn.Module) -> None:
    """Take out of a copy what hooks have become in it."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._load_state_dict_post_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__func__", None) is nullcontext.__exit__:
                    del hooks[key]


# Torch tells these of every optimiser and module of the process. Its hooks are hung up with the
# first guard, and never taken down: a guard may be collected while torch goes through them.
# They are told in the order in which they were made, which is that of other ranks too. The guards
# of two algorithms on one model talk to other ranks before a step.
_GUARDS: weakref.WeakKeyDictionary[Guard, None] = weakref.WeakKeyDictionary()


@cache
def _hook_torch() -> None:
    def tell(method: Callable[..., None]) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            for guard in list(_GUARDS):
                method(guard, *args)

        return hook

    register_optimizer_step_pre_hook(tell(lambda g, it, *_: g.before_optimizer_step(it)))
    register_optimizer_step_post_hook(tell(lambda g, it, *_: g.after_optimizer_step(it)))
    register_module_parameter_registration_hook(tell(Guard.before_registration))
    register_module_module_registration_hook(
        tell(lambda g, parent, _, child: g.after_registration(parent, child))
    )
