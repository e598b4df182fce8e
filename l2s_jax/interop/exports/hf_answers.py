# SPDX-License-Identifier: Apache-2.0
"""Answers prompts with a Hugging Face folder by transformers and torch only.

`hf_form` runs this program in a separate process. It reads a request as JSON
from standard input and writes a reply as JSON to standard output. It does not
import l2s_jax, like the code of a user of the folder.

Request: `folder`, `prompts`, `max_prompt_len` and `max_new_tokens` (both in
tokens), and `ways`: options of `generate` and `padding_side`, by a name.
Reply: `ids` of the prompts; `tokens` and `texts` of the answers, by that name.
"""

import json
import sys

import torch
import transformers


def answer(request):
  """Returns the reply to a request."""
  folder = request['folder']
  config = transformers.AutoConfig.from_pretrained(
    folder, trust_remote_code=True
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    folder, trust_remote_code=True
  )
  model = (
    transformers.AutoModelForSeq2SeqLM
    if config.is_encoder_decoder
    else transformers.AutoModelForCausalLM
  ).from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
  model.eval()
  ids = [
    found[: request['max_prompt_len']]
    for found in tokenizer(request['prompts']).input_ids
  ]
  tokens, texts = {}, {}
  for name, options in request['ways'].items():
    options = dict(options)
    tokenizer.padding_side = options.pop('padding_side')
    batch = tokenizer.pad({'input_ids': ids}, return_tensors='pt')
    with torch.no_grad():
      found = model.generate(
        input_ids=batch['input_ids'],
        attention_mask=batch['attention_mask'],
        max_new_tokens=request['max_new_tokens'],
        **options,
      )
    prefix = 1 if config.is_encoder_decoder else batch['input_ids'].shape[1]
    tokens[name] = found[:, prefix:].tolist()
    texts[name] = tokenizer.batch_decode(
      found[:, prefix:], skip_special_tokens=True
    )
  return {'ids': ids, 'tokens': tokens, 'texts': texts}


if __name__ == '__main__':
  json.dump(answer(json.load(sys.stdin)), sys.stdout)
