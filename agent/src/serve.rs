//! The agent's life: what is built in which order, and what its end leaves.

use crate::{
    config::Settings,
    host,
    instance::{
        arguments::{self, Known},
        board::Board,
        context::{Context, Events},
        leases::{self, Leases},
        machine::Local,
        registry::Registry,
        routes::Routes,
        session::Deadline,
        turns::Turns,
    },
    link,
    lock::{self, Lock},
    proxy::ProxyHandle,
};
use anyhow::{Context as _, ensure};
use drover_proto::{
    files,
    transport::Target,
    v1::{Capacity, Severity},
};
use std::{
    collections::BTreeMap,
    path::Path,
    process::Stdio,
    sync::{Arc, atomic::AtomicI64},
    time::Duration,
};
use tokio::time::timeout;

/// How long `llama-server --help` may take.
const HELP_DEADLINE: Duration = Duration::from_secs(20);
/// How long an agent that is about to end is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// An agent at work.
#[derive(Debug)]
pub struct Agent {
    settings: Arc<Settings>,
    proxy: ProxyHandle,
    link: link::Link,
    _lock: Lock,
}

impl Agent {
    /// Builds and starts everything: the lock, the proxy, what earlier agents left, the link.
    pub async fn start(settings: Settings, telemetry: drover_telemetry::Handle) -> anyhow::Result<Self> {
        let settings = Arc::new(settings);
        let lock = lock::take(&settings.state_dir, LOCK_PATIENCE).await?;
        let known = known_flags(&settings.llama_server, &settings.llama_server_environment).await?;
        let proxy = ProxyHandle::ensure(settings.proxy()).await?;
        let (events, waiting_events) = Events::new();
        let cgroup_base = settings.cgroup_root.base(&settings.state_dir).unwrap_or_else(|error| {
            let message = format!(
                "servers get no cgroup of their own, so that of a server whose shim is dead only what stays in its session \
                 is ended with it: {error:#} (Delegate=yes in the systemd unit, or cgroup_root in the configuration; \
                 cgroup_root = \"off\" if that is wanted)"
            );
            events.tell("", "NoCgroups", Severity::Warning, message);
            None
        });
        let context = Arc::new(Context {
            cgroup_base,
            boot_id: host::processes::boot_id().context("boot id")?,
            known,
            routes: Routes::new(Arc::new(proxy.clone())),
            board: Board::default(),
            turns: Turns::new(settings.launches_at_once),
            session: Deadline::default(),
            leases: Leases::default(),
            events,
            taken_bytes: AtomicI64::new(0),
            settings: settings.clone(),
            machine: Arc::new(Local),
        });
        leases::keep(context.clone()).context("the thread of the leases")?;
        let registry = Arc::new(Registry::adopt(context.clone()).await.context("what earlier agents left")?);
        tokio::spawn(tell_of_proxies(context.clone(), proxy.clone()));
        let proxy_address = settings.proxy_advertise.clone().unwrap_or_else(|| proxy.address().to_string());
        let link = link::start(link::Parts {
            registry,
            coordinators: Arc::new(Target::new(&settings.coordinators, &settings.security, Some(&settings.node))?),
            about: link::session::About {
                machine_id: host::machine::id(&settings.state_dir)?,
                boot_id: context.boot_id.clone(),
                labels: settings.labels.clone(),
                capacity: Capacity {
                    memory_bytes: settings.memory_bytes,
                    cpus: host::machine::cpus(),
                    gpus: settings.gpus.clone(),
                },
                proxy_address,
            },
            events: waiting_events,
            telemetry,
        })
        .await?;
        Ok(Self { settings, proxy, link, _lock: lock })
    }

    /// Address of the host's proxy.
    #[must_use]
    pub fn proxy_address(&self) -> String {
        self.proxy.address().to_string()
    }

    /// Waits for the session and writes the ready file. One that can't be written is told, and ends no agent: the disk may
    /// be full, and servers run here.
    pub async fn ready(&self) {
        self.link.joined().await;
        if let Some(path) = &self.settings.ready_file {
            let content = serde_json::json!({ "proxy": self.proxy_address(), "node": self.settings.node });
            if let Err(error) = files::write_atomically(path, content.to_string().as_bytes()) {
                tracing::error!(%error, "ready_file = {} can't be written: name a file in a folder of this agent", path.display());
            }
        }
    }

    /// Ends the agent. Servers, shims and the proxy go on.
    pub async fn end(self) {
        if let Some(path) = &self.settings.ready_file {
            let _ = std::fs::remove_file(path);
        }
        self.link.stop(self.settings.end_deadline()).await;
    }
}

/// Tells when another proxy has taken the place of the one that served.
async fn tell_of_proxies(context: Arc<Context>, proxy: ProxyHandle) {
    let mut pid = proxy.pid();
    loop {
        let next = proxy.replaced(pid).await;
        let message = format!("pid {next} serves in place of the proxy with pid {pid}");
        context.events.tell("", "ProxyRestarted", Severity::Warning, message);
        pid = next;
    }
}

/// Asks the installed llama-server which flags it knows.
async fn known_flags(llama_server: &Path, configured: &BTreeMap<String, String>) -> anyhow::Result<Known> {
    #[allow(clippy::disallowed_methods, reason = "asks the program for its flags; it serves nothing and ends at once")]
    let mut command = tokio::process::Command::new(llama_server);
    // As it is started to serve: without its LD_LIBRARY_PATH, say, it would not even print its help.
    let environment = arguments::environment(&[], Path::new("/"), configured);
    command.arg("--help").env_clear().envs(environment).stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let shown = llama_server.display();
    let output = timeout(HELP_DEADLINE, command.output())
        .await
        .with_context(|| format!("llama_server = {shown}: --help has not ended within {} s", HELP_DEADLINE.as_secs()))?
        .with_context(|| format!("llama_server = {shown}"))?;
    let known = Known::parse(&String::from_utf8_lossy(&output.stdout));
    ensure!(
        known.has("--host") && known.has("--metrics"),
        "llama_server = {shown}: its --help ({}) shows no flags of a llama-server: name llama.cpp's HTTP server",
        output.status
    );
    Ok(known)
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "writes a program to ask")]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[tokio::test]
    async fn the_flags_are_asked_for_in_the_configured_environment() {
        let place = tempfile::tempdir().unwrap();
        let program = place.path().join("llama-server");
        std::fs::write(&program, "#!/bin/sh\n[ \"$LIBRARIES\" = here ] && printf '%s\\n' '--host X' '--metrics'\n")
            .unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        let error = known_flags(&program, &BTreeMap::new()).await.unwrap_err().to_string();
        assert!(error.contains("shows no flags"), "{error}");
        let configured = BTreeMap::from([("LIBRARIES".to_owned(), "here".to_owned())]);
        assert!(known_flags(&program, &configured).await.unwrap().has("--host"));
    }
}
