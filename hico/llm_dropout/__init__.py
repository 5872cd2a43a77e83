"""Progressive visual dropout: fewer visual tokens in deeper layers of a stock Hugging Face decoder.

```python
handle = patch(model, "uniform@4:0.75,attention@18:0.25")      # a bare decoder, a causal LM, or the whole hico model
out = model(inputs_embeds=embeds, attention_mask=mask, visual_mask=spans, labels=labels)
handle.remove()                                                # or: with patch(model, schedule): ...
```

What a patched decoder (``Qwen2Model`` and its like) takes and gives, beside what it always did:

* ``visual_mask`` ``(B, S)``, aligned with the tokens of this call: 0 is text, ``k`` the k-th video or image of the
  row; a bool mask has one span per unbroken run. Without it, or where it is all text, the call is untouched. Pass it
  in the prefill only: a cache that was filled with dropping remembers what its layers hold.
* ``labels`` ``(B, S)``, optional: only to find the query rows of the attention policy in training.
* ``output.drop_plan``, a ``DropPlan`` (absent from calls that concern no dropping): ``kept_indices`` ``(B, S')``, -1
  at padding; ``gather(values, fill=...)`` for anything laid out as ``(B, S)``; ``shift_labels(labels)`` for the loss.
  ``last_hidden_state`` has length S'.

A patched causal LM (``Qwen2ForCausalLM`` and its like) takes ``visual_mask`` in ``forward`` and in ``generate`` and
computes its loss over the shortened sequence; a model that wraps the decoder otherwise does the same in two lines:

```python
out = decoder(..., visual_mask=visual_mask, labels=labels)
plan = getattr(out, "drop_plan", None)
shift_labels = plan.shift_labels(labels) if plan is not None else None
```
"""

from hico.llm_dropout.patch import DropHandle, add_visual_mask, find_handle, patch
from hico.llm_dropout.plan import DropPlan
from hico.llm_dropout.policies import DropPolicy
from hico.llm_dropout.schedule import DropSchedule, DropStage

__all__ = [
    "DropHandle",
    "DropPlan",
    "DropPolicy",
    "DropSchedule",
    "DropStage",
    "add_visual_mask",
    "find_handle",
    "patch",
]
