"""A client generated from the .proto files does what the Rust one does.

python fleet_client.py PROTO_DIR ADDRESS SECRET_FILE: generates the stubs into a temporary folder, then applies, lists,
watches, scales and deletes.
"""

import pathlib
import sys
import tempfile
import threading
import time

import grpc
from grpc_tools import protoc

DEADLINE = 60


def generate(protos: str, out: str) -> None:
    wanted = ["drover/v1/types.proto", "drover/v1/processes.proto", "drover/v1/fleet.proto"]
    include = pathlib.Path(protoc.__file__).parent / "_proto"
    code = protoc.main(["protoc", f"-I{protos}", f"-I{include}", f"--python_out={out}", f"--grpc_python_out={out}", *wanted])
    assert code == 0, "the stubs could not be generated"


def until(what, condition):
    """Asks for a condition until it gives something, within the deadline."""
    end = time.monotonic() + DEADLINE
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"{what}: not within {DEADLINE} s"
        time.sleep(0.05)


def main() -> None:
    protos, address, secret_file = sys.argv[1:4]
    with tempfile.TemporaryDirectory() as out:
        generate(protos, out)
        sys.path.insert(0, out)
        from drover.v1 import fleet_pb2 as fleet
        from drover.v1 import fleet_pb2_grpc, types_pb2 as types

        metadata = (("authorization", "Bearer " + pathlib.Path(secret_file).read_text().strip()),)
        channel = grpc.insecure_channel(address)
        stub = fleet_pb2_grpc.FleetServiceStub(channel)
        call = {"metadata": metadata, "timeout": DEADLINE}

        try:
            stub.ListNodes(fleet.ListNodesRequest(), timeout=DEADLINE)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNAUTHENTICATED, error
        else:
            raise AssertionError("a call without the secret was answered")

        seen, ready = [], threading.Event()
        watch = stub.WatchEvents(fleet.WatchEventsRequest(follow=True), metadata=metadata)

        def collect() -> None:
            try:
                for answer in watch:
                    seen.append(answer.event)
                    if answer.event.reason == "Ready" and answer.event.object.startswith("instance/py-"):
                        ready.set()
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.CANCELLED, error

        collector = threading.Thread(target=collect)
        collector.start()

        spec = types.DeploymentSpec(
            name="py", model_path="tiny.gguf", replicas=1, slots=1, context_tokens=512, threads=1, memory_bytes=1 << 28
        )
        applied = stub.ApplyDeployment(fleet.ApplyDeploymentRequest(spec=spec), **call)
        assert applied.changed and applied.deployment.generation == 1, applied
        same = stub.ApplyDeployment(fleet.ApplyDeploymentRequest(spec=spec, generation=1), **call)
        assert not same.changed, same
        try:
            stub.ApplyDeployment(fleet.ApplyDeploymentRequest(spec=spec, generation=7), **call)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.ABORTED and "generation 1" in error.details(), error
        else:
            raise AssertionError("an old generation was accepted")

        assert ready.wait(DEADLINE), [event.reason for event in seen]
        listed = stub.ListInstances(fleet.ListInstancesRequest(deployment="py"), **call).instances
        assert [i.state for i in listed] == [types.INSTANCE_STATE_READY], listed
        one = stub.GetInstance(fleet.GetInstanceRequest(id=listed[0].id), **call).instance
        assert one.pid > 0 and one.node in ("a", "b") and one.token.revision > 0, one
        assert "py" in [d.spec.name for d in stub.ListDeployments(fleet.ListDeploymentsRequest(), **call).deployments]
        lines = [l for a in stub.StreamLogs(fleet.StreamLogsRequest(instance=one.id), **call) for l in a.lines]
        assert lines, "no log lines"

        stub.ScaleDeployment(fleet.ScaleDeploymentRequest(name="py", replicas=2), **call)
        until("two are ready", lambda: stub.GetDeployment(fleet.GetDeploymentRequest(name="py"), **call).deployment.ready_replicas == 2)
        stub.DeleteDeployment(fleet.DeleteDeploymentRequest(name="py"), **call)

        def gone() -> bool:
            try:
                stub.GetDeployment(fleet.GetDeploymentRequest(name="py"), **call)
            except grpc.RpcError as error:
                return error.code() == grpc.StatusCode.NOT_FOUND
            return False

        until("the deployment is gone", gone)
        until("the removal was watched", lambda: any(e.reason == "Removed" for e in seen))
        watch.cancel()
        collector.join(DEADLINE)
        channel.close()
        print("generated client: apply, list, get, watch of", len(seen), "events, logs, scale, delete")


main()
