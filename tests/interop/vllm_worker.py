"""Greedy completions by vLLM in fp32.

`vllm_worker.py NUM_NEW_TOKENS MODEL...` reads prompts (token ids) as JSON from its input. The last line it prints is
JSON: for every model the generated tokens of every prompt.
"""

import json
import sys

from megatron_tpt.generation import EngineOptions, Sampling, VLLMEngine, complete


def main() -> None:
    prompts = json.load(sys.stdin)
    num_new_tokens, models = int(sys.argv[1]), sys.argv[2:]
    generated = []
    for model in models:
        options = EngineOptions(model=model, max_model_len=len(prompts[0]) + num_new_tokens, dtype="float32")
        with VLLMEngine(options) as engine:
            completions = complete(engine, prompts, Sampling(temperature=0, max_new_tokens=num_new_tokens))
        generated.append([completion.token_ids for completion in completions])
    print(json.dumps(generated))


if __name__ == "__main__":
    main()
