"""A client without generated code: it finds the service by reflection. usage: grpc_client.py HTTP_ADDRESS GRPC_ADDRESS"""

import sys

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

channel = grpc.insecure_channel(sys.argv[2])
database = ProtoReflectionDescriptorDatabase(channel)
services = sorted(database.get_services())
assert "baton.v1.Generation" in services and "grpc.health.v1.Health" in services, services
assert not [name for name in services if name.startswith("baton.node.")], f"internal services are not advertised: {services}"

pool = descriptor_pool.DescriptorPool(database)
service = pool.FindServiceByName("baton.v1.Generation")


def call(method, **fields):
    found = service.methods_by_name[method]
    request = message_factory.GetMessageClass(found.input_type)(**fields)
    answer = message_factory.GetMessageClass(found.output_type)
    kind = channel.unary_stream if found.server_streaming else channel.unary_unary
    return kind(f"/{service.full_name}/{method}", type(request).SerializeToString, answer.FromString)(request, timeout=120)


models = call("ListModels").models
assert [model.id for model in models] == ["SmolLM2-135M-Instruct"], models

ids = call("Tokenize", text="Hello, world").ids
assert call("Detokenize", ids=ids).text == "Hello, world", ids

chat = {"messages": [{"role": "user", "content": "Say hello."}]}
events = list(call("Generate", chat=chat, stopping={"max_tokens": 16}))
assert [event.sequence for event in events] == list(range(len(events))), events
kinds = [event.WhichOneof("event") for event in events]
assert kinds[0] == "started" and kinds[-1] == "finished" and set(kinds[1:-1]) == {"delta"}, kinds
finished = events[-1].finished
assert finished.usage.completion_tokens == sum(len(event.delta.ids) for event in events[1:-1]), finished
assert finished.served.prefill_node and finished.served.decode_node and finished.served.kv_bytes > 0, finished.served
assert finished.timings.ttft_ms > 0, finished.timings

events = list(call("Generate", chat=chat, sampling={"n": 2}, stopping={"max_tokens": 4}))
assert [event.finished.choice for event in events if event.WhichOneof("event") == "finished"] in ([0, 1], [1, 0]), events
ids = [[id for event in events if event.WhichOneof("event") == "delta" and event.delta.choice == choice for id in event.delta.ids] for choice in (0, 1)]
assert ids[0] == ids[1] and len(ids[0]) == 4, ids

asked = {"presence_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {0: -100}}
events = list(call("Generate", chat=chat, stopping={"max_tokens": 4}, sampling=asked, output={"logprobs": True, "top_logprobs": 3}))
for delta in [event.delta for event in events[1:-1] if event.delta.ids]:
    assert len(delta.ids) == len(delta.logprobs) == len(delta.top_logprobs), delta
    assert all(len(top.tokens) == 3 and top.tokens[0].logprob >= top.tokens[2].logprob for top in delta.top_logprobs), delta

try:
    list(call("Generate", chat=chat, sampling={"temperature": -1}))
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    assert any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata()), "the error has google.rpc details"
else:
    raise AssertionError("a negative temperature was not refused")

health = pool.FindServiceByName("grpc.health.v1.Health").methods_by_name["Check"]
request = message_factory.GetMessageClass(health.input_type)()
answer = message_factory.GetMessageClass(health.output_type)
check = channel.unary_unary("/grpc.health.v1.Health/Check", type(request).SerializeToString, answer.FromString)
assert check(request, timeout=10).status == 1, "SERVING"

print("all checks passed")
