//! An etcd of our own: one member on free ports of loopback, with its data below the fleet's folder.

use super::{place::Place, process::Process};
use crate::{failure::Failure, gateway::Gateway};
use drover_proto::transport::Security;
use std::{net::TcpListener, path::Path, time::Duration};
use tokio::time::Instant;

/// Attempts to find free ports: between looking and binding somebody else may take one.
const ATTEMPTS: usize = 3;
const READY_TIMEOUT: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_millis(20);

/// Starts it and waits until it answers; gives its URL for clients. The process is in `slot` from the moment it exists:
/// this may be cancelled at any time.
pub async fn start(program: &Path, place: &Place, slot: &mut Option<Process>) -> Result<String, Failure> {
    let mut last = Failure::Answered("etcd was not started".to_owned());
    for _ in 0..ATTEMPTS {
        let (client, peer) = free_ports().map_err(|e| Failure::Answered(format!("no free port on 127.0.0.1: {e}")))?;
        let address = format!("127.0.0.1:{client}");
        let log = place.log("etcd");
        let process = Process::start("etcd", program, &arguments(client, peer, &place.data.join("etcd")), &log)
            .map_err(|e| Failure::Answered(format!("{} can't be started: {e}", program.display())))?;
        let (ended, obituary) = (process.ended(), process.mourner());
        *slot = Some(process);
        tokio::select! {
            ready = ready(&address) => return ready.map(|()| format!("http://{address}")),
            end = ended => last = Failure::Answered(obituary(end)),
        }
    }
    Err(last)
}

fn arguments(client: u16, peer: u16, data: &Path) -> Vec<String> {
    let peer = format!("http://127.0.0.1:{peer}");
    let client = format!("http://127.0.0.1:{client}");
    let data = data.display().to_string();
    let pairs = [
        ("--name", "dev"),
        ("--data-dir", &data),
        ("--listen-client-urls", &client),
        ("--advertise-client-urls", &client),
        ("--listen-peer-urls", &peer),
        ("--initial-advertise-peer-urls", &peer),
        ("--initial-cluster", &format!("dev={peer}")),
        ("--logger", "zap"),
    ];
    pairs.iter().flat_map(|(key, value)| [(*key).to_owned(), (*value).to_owned()]).collect()
}

/// Two ports that were free a moment ago, held together so that they differ.
fn free_ports() -> std::io::Result<(u16, u16)> {
    let (a, b) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
    Ok((a.local_addr()?.port(), b.local_addr()?.port()))
}

async fn ready(address: &str) -> Result<(), Failure> {
    let etcd = Gateway::new(address, &Security::default())?;
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        if let Ok((status, body)) = etcd.get("/health", Duration::from_secs(1)).await {
            let health: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
            if status.is_success() && health["health"] == "true" {
                return Ok(());
            }
        }
        if Instant::now() >= deadline {
            let seconds = READY_TIMEOUT.as_secs();
            return Err(Failure::TimedOut(format!("etcd at {address} was not healthy within {seconds} s")));
        }
        tokio::time::sleep(INTERVAL).await;
    }
}
