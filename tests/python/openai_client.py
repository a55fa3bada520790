"""OpenAI's own client against a Baton cluster. usage: openai_client.py HTTP_ADDRESS GRPC_ADDRESS"""

import sys

import openai

client = openai.OpenAI(base_url=f"http://{sys.argv[1]}/v1", api_key="none", max_retries=0, timeout=120)

models = client.models.list().data
assert [model.id for model in models] == ["SmolLM2-135M-Instruct"], models
assert client.models.retrieve("SmolLM2-135M-Instruct").owned_by == "baton"

messages = [{"role": "user", "content": "Name the three primary colours."}]
greedy = dict(model="SmolLM2-135M-Instruct", messages=messages, temperature=0, max_tokens=24)
whole = client.chat.completions.create(**greedy, logprobs=True)
choice = whole.choices[0]
assert choice.message.role == "assistant" and choice.message.content, whole
assert choice.finish_reason in ("stop", "length"), whole
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens, whole.usage
assert len(choice.logprobs.content) == whole.usage.completion_tokens, choice.logprobs
assert all(token.logprob <= 0 for token in choice.logprobs.content)

# Streamed, the same text; the usage comes last, once.
chunks = list(client.chat.completions.create(**greedy, stream=True, stream_options={"include_usage": True}))
assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == choice.message.content, (text, choice.message.content)
assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True], chunks
assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0, "the prompt's whole blocks are held by now"
reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
assert reasons[:-1] == [None] * (len(reasons) - 1) and reasons[-1] == choice.finish_reason, reasons

# Alternatives: greedily the best one is drawn. They change nothing, nor do they depend on what else is asked for.
top = client.chat.completions.create(**greedy, logprobs=True, top_logprobs=20).choices[0]
assert top.message.content == choice.message.content
for token, plain in zip(top.logprobs.content, choice.logprobs.content, strict=True):
    logprobs = [other.logprob for other in token.top_logprobs]
    assert len(logprobs) == 20 and logprobs == sorted(logprobs, reverse=True), token
    assert (token.top_logprobs[0].token, token.top_logprobs[0].logprob) == (token.token, token.logprob), token
    assert (token.token, token.logprob, bytes(token.bytes)) == (plain.token, plain.logprob, bytes(plain.bytes)), token
streamed = [chunk for chunk in client.chat.completions.create(**greedy, logprobs=True, top_logprobs=2, stream=True) if chunk.choices]
listed = [token for chunk in streamed if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
assert [token.logprob for token in listed] == [token.logprob for token in top.logprobs.content]
assert [len(token.top_logprobs) for token in listed] == [2] * len(listed)

# Penalties: what has been drawn is drawn less often.
def repeated(**asked):
    request = dict(model=models[0].id, prompt="one two one two one two one two", temperature=0, max_tokens=40, logprobs=0)
    answer = client.completions.create(**request, **asked)
    tokens = answer.choices[0].logprobs.tokens
    return len(tokens) - len(set(tokens))


assert repeated(presence_penalty=2, frequency_penalty=2) < repeated()
assert repeated(extra_body={"repetition_penalty": 1.5}) < repeated()

# Bias: a favoured token is all that is drawn, in spite of its own log-probability.
favoured = client.completions.create(model=models[0].id, prompt="Once", max_tokens=5, logit_bias={"40": 100}, logprobs=3).choices[0].logprobs
assert len(favoured.tokens) == 5 and len(set(favoured.tokens)) == 1, favoured
for token, logprob, others in zip(favoured.tokens, favoured.token_logprobs, favoured.top_logprobs, strict=True):
    assert 3 <= len(others) <= 4 and others[token] == logprob, others

# A seed fixes a sampled answer; another seed gives another.
sampled = dict(model=models[0].id, messages=messages, temperature=1.2, max_completion_tokens=24)
answers = [client.chat.completions.create(**sampled, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
assert answers[0] == answers[1] != answers[2], answers

# Several choices: the first is the answer that the seed gives alone, and each is the same again, whole or streamed.
several = client.chat.completions.create(**sampled, seed=1, n=3)
texts = [choice.message.content for choice in several.choices]
assert [choice.index for choice in several.choices] == [0, 1, 2], several
assert texts[0] == answers[0] and len(set(texts)) == 3, (texts, answers)
alone = client.chat.completions.create(**sampled, seed=1)
assert several.usage.prompt_tokens == alone.usage.prompt_tokens, "the prompt counts once"
assert several.usage.completion_tokens > alone.usage.completion_tokens, several.usage
chunks = list(client.chat.completions.create(**sampled, seed=1, n=3, stream=True, stream_options={"include_usage": True}))
assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True], chunks
assert chunks[-1].usage.completion_tokens == several.usage.completion_tokens, chunks[-1]
for index, text in enumerate(texts):
    own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
    assert own[0].delta.role == "assistant" and all(part.delta.role is None for part in own[1:]), own
    assert "".join(part.delta.content or "" for part in own) == text, (own, text)
    reasons = [part.finish_reason for part in own]
    assert reasons == [None] * (len(own) - 1) + [several.choices[index].finish_reason], reasons
greedy_texts = {choice.message.content for choice in client.chat.completions.create(**greedy, n=2).choices}
assert greedy_texts == {choice.message.content}, "greedy choices are all equal"

# A stop string, and a conversation.
stop = choice.message.content[8:12]
stopped = client.chat.completions.create(**greedy, stop=[stop])
assert stopped.choices[0].finish_reason == "stop", stopped
assert stopped.choices[0].message.content == choice.message.content[: choice.message.content.index(stop)], stopped
turns = messages + [{"role": "assistant", "content": text}, {"role": "user", "content": [{"type": "text", "text": "And in German?"}]}]
assert client.chat.completions.create(model=models[0].id, messages=turns, max_tokens=8).usage.completion_tokens > 0

# Completions: text and token ids.
plain = client.completions.create(model=models[0].id, prompt="The capital of France is", max_tokens=6, temperature=0, logprobs=0)
assert plain.choices[0].text and len(plain.choices[0].logprobs.tokens) == plain.usage.completion_tokens, plain
streamed = client.completions.create(model=models[0].id, prompt="The capital of France is", max_tokens=6, temperature=0, stream=True)
assert "".join(chunk.choices[0].text for chunk in streamed) == plain.choices[0].text
pair = client.completions.create(model=models[0].id, prompt="The capital of France is", max_tokens=6, seed=1, n=2, best_of=2, logprobs=0)
assert [choice.index for choice in pair.choices] == [0, 1], pair
assert sum(len(choice.logprobs.tokens) for choice in pair.choices) == pair.usage.completion_tokens, pair
streamed = client.completions.create(model=models[0].id, prompt="The capital of France is", max_tokens=6, seed=1, n=2, stream=True)
texts = ["", ""]
for chunk in streamed:
    texts[chunk.choices[0].index] += chunk.choices[0].text
assert texts == [choice.text for choice in pair.choices], (texts, pair)


def refused(kind, code, **request):
    try:
        client.chat.completions.create(**{"model": models[0].id, "messages": messages, **request})
    except kind as error:
        assert error.code == code, (error.code, code)
    else:
        raise AssertionError(f"{request} was not refused")


refused(openai.BadRequestError, "NOT_BUILT", tools=[{"type": "function", "function": {"name": "f"}}])
refused(openai.BadRequestError, "INVALID_FIELD", n=17)
refused(openai.BadRequestError, "NOT_BUILT", n=2, extra_body={"best_of": 3})
refused(openai.BadRequestError, "INVALID_FIELD", temperature=-1)
refused(openai.BadRequestError, "INVALID_FIELD", top_logprobs=3)
refused(openai.BadRequestError, "INVALID_FIELD", logprobs=True, top_logprobs=21)
refused(openai.BadRequestError, "INVALID_FIELD", presence_penalty=2.5)
refused(openai.BadRequestError, "INVALID_FIELD", frequency_penalty=-2.5)
refused(openai.BadRequestError, "INVALID_FIELD", extra_body={"repetition_penalty": 0})
refused(openai.BadRequestError, "INVALID_FIELD", logit_bias={"1": 101})
refused(openai.BadRequestError, "INVALID_FIELD", logit_bias={"one": 1})
refused(openai.BadRequestError, "TOKEN_OUT_OF_VOCABULARY", logit_bias={"50000": 1})
refused(openai.BadRequestError, "UNKNOWN_FIELD", extra_body={"frobnicate": 1})
refused(openai.NotFoundError, "UNKNOWN_MODEL", model="gpt-5")

print("all checks passed")
