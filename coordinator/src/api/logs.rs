//! Logs of an instance: read by the proxy of the node that owns it, which lives while the agent is away.

use super::convert::no_instance;
use crate::{gateway::ProxyClient, plan::snapshot::Snapshot};
use drover_proto::{
    ids,
    status::{invalid_field, reason, with_reason},
    v1::{StreamLogsRequest, StreamLogsResponse},
};
use futures::{StreamExt as _, stream::BoxStream};
use tonic::{Code, Status};

const TAIL: i32 = 100;
const TAIL_MAX: i32 = 10_000;
/// Lines put into one message at most.
const CHUNK: usize = 200;

pub(super) async fn stream(
    snapshot: &Snapshot,
    proxies: &ProxyClient,
    request: StreamLogsRequest,
) -> Result<BoxStream<'static, Result<StreamLogsResponse, Status>>, Status> {
    let id = &request.instance;
    ids::check_instance_id(id).map_err(|e| invalid_field("instance", e.to_string()))?;
    let tail = match request.tail_lines {
        0 => TAIL,
        n if (1..=TAIL_MAX).contains(&n) => n,
        n => {
            return Err(invalid_field(
                "tail_lines",
                format!("{n} is not allowed: use 1 to {TAIL_MAX}, or 0 for {TAIL}"),
            ));
        }
    };
    if !snapshot.instances.contains_key(id) {
        return Err(no_instance(id));
    }
    let away = |what: String| with_reason(Code::Unavailable, reason::NODE_UNREACHABLE, what);
    let owner = snapshot.claims.get(id).map(|c| c.value.node.clone());
    let owner = owner.ok_or_else(|| away(format!("no node owns {id} yet, so there is no log")))?;
    let address = snapshot.nodes.get(&owner).map(|n| n.value.proxy_address.clone()).unwrap_or_default();
    let tail = u32::try_from(tail).unwrap_or(0);
    let lines = proxies
        .logs(&address, id, tail, request.follow)
        .await
        .map_err(|e| away(format!("the proxy of {owner} at {address}: {e}")))?;
    let owner_name = owner;
    Ok(lines
        .ready_chunks(CHUNK)
        .map(move |chunk| {
            let lines: Result<Vec<String>, _> = chunk.into_iter().collect();
            match lines {
                Ok(lines) => Ok(StreamLogsResponse { lines }),
                Err(error) => Err(with_reason(
                    Code::Unavailable,
                    reason::NODE_UNREACHABLE,
                    format!("the log stream from {owner_name} broke: {error}"),
                )),
            }
        })
        .boxed())
}
