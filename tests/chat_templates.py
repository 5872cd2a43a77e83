"""Small tokenizers that speak as families of LLMs do: their special tokens and the shape of their chat templates."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hico.prompt import CHAT_TEMPLATE, IMAGE_TOKEN, VIDEO_TOKEN
from hico.tokenizer import _byte_characters

QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thoughts of turns before the last question are taken out, and the turns after it have some, empty if need be.
QWEN3 = (
    "{%- set ns = namespace(last=0) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}"
    "{%- set content = m.content if m.content is string else '' -%}"
    "{%- if m.role != 'assistant' -%}{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' -}}"
    "{%- else -%}"
    "{%- set thought = '' -%}"
    "{%- if '</think>' in content -%}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}"
    "{%- endif -%}"
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- if loop.index0 > ns.last -%}{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}"
    "{{- content + '<|im_end|>\n' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
LLAMA3 = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# No generation prompt, a system message before the last question, and turns that must alternate.
MISTRAL = (
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}{%- set talk = messages[1:] -%}"
    "{%- else -%}{%- set talk = messages -%}{%- endif -%}"
    "{{- bos_token -}}{%- for message in talk -%}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate user and assistant') -}}{%- endif -%}"
    "{%- if message.role == 'user' -%}"
    "{%- if system is defined and loop.index0 >= (talk | length) - 2 -%}"
    "{{- '[INST] ' + system + '\n\n' + message.content + '[/INST]' -}}"
    "{%- else -%}{{- '[INST] ' + message.content + '[/INST]' -}}{%- endif -%}"
    "{%- else -%}{{- ' ' + message.content | trim + eos_token -}}{%- endif -%}{%- endfor -%}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FAMILIES = {
    "chatml": (CHAT_TEMPLATE, CHATML),
    "qwen2": (QWEN2, CHATML),
    "qwen3": (QWEN3, CHATML),
    "llama3": (LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"]),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]),
}


def family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes in which newlines pair up, with the special tokens and template of a family."""
    template, special = FAMILIES[family]
    special = [*special, VIDEO_TOKEN, IMAGE_TOKEN]
    if family in ("mistral", "gemma"):  # sentencepiece: a space belongs to the word after it
        vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581": 256, "\u2581Y": 257, "Y": 258}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("\u2581", "Y")], byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    else:
        bytes_ = _byte_characters()
        newline, space = ({code: sign for sign, code in bytes_.items()}[ord(sign)] for sign in "\n ")
        vocab = bytes_ | {newline * 2: 256, space + "Y": 257}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(newline, newline), (space, "Y")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    names = {"bos_token": special[0], "eos_token": special[2] if special[0] in CHATML else special[1]}
    if special[0] not in CHATML:
        # As the real ones do: the beginning is added to every text.
        bos = (special[0], tokenizer.token_to_id(special[0]))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    else:
        del names["bos_token"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], chat_template=template, padding_side="left", **names
    )
