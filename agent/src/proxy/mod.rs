//! The host's data plane: takes requests from coordinators' gateways over HTTP and hands them to llama-servers over their
//! unix sockets. A process of its own that outlives the agent, so that killing or upgrading the agent cuts no stream.
//!
//! Owns: the HTTP listener, the control socket `proxy.sock`, the count of requests in flight for each instance, and how the
//! agent finds, starts and supervises this process ([`client`]). The agent gives it the full set of routes; it goes on with
//! the last set when the agent is gone. Must never: signal a llama-server, write an instance's files, or decide what runs.

mod answer;
pub mod client;
mod control;
mod forward;
mod hand_over;
mod logs;
mod own_log;
mod peer;
mod retired;
pub mod route;
mod serve;
mod spawn;
mod tail;
mod wire;

use anyhow::Context as _;
use drover_proto::transport::{Secret, Security};
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio_util::sync::CancellationToken;

pub use client::ProxyHandle;
pub use route::{Route, RouteState};
pub use serve::Proxy;

/// How long streams may go on after the proxy was told to end, unless configured.
pub const DRAIN: Duration = Duration::from_secs(30);

/// What a proxy needs to know; the agent hands it on as arguments. Holds no secret, only the path of one.
#[derive(Debug, Clone)]
pub struct ProxySettings {
    /// Where to listen for HTTP; port 0 takes the port remembered in `state_dir`, or else any free one.
    pub listen: SocketAddr,
    /// Folder of the control socket; its path must be short (a socket's path has at most 107 bytes).
    pub runtime_dir: PathBuf,
    /// Folder of the proxy's log and of the remembered address.
    pub state_dir: PathBuf,
    /// File with the join secret; without one only loopback is served.
    pub join_secret_file: Option<PathBuf>,
    /// Serve beyond loopback without encryption.
    pub allow_plaintext: bool,
    /// How long streams may go on after the proxy was told to end.
    pub drain: Duration,
    /// What is logged, in `tracing`'s filter syntax.
    pub log_filter: String,
    /// The program to start the proxy from (`drover-agent`); none: the running one.
    pub executable: Option<PathBuf>,
}

impl ProxySettings {
    /// Settings with defaults for all but the addresses and folders.
    #[must_use]
    pub fn new(listen: SocketAddr, runtime_dir: &Path, state_dir: &Path) -> Self {
        Self {
            listen,
            runtime_dir: runtime_dir.to_owned(),
            state_dir: state_dir.to_owned(),
            join_secret_file: None,
            allow_plaintext: false,
            drain: DRAIN,
            log_filter: "info".to_owned(),
            executable: None,
        }
    }

    /// Path of the control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.runtime_dir.join("proxy.sock")
    }

    /// The proxy's own log.
    #[must_use]
    pub fn log_file(&self) -> PathBuf {
        self.state_dir.join("proxy.log")
    }

    /// Where a proxy that is about to end offers its listener.
    fn next_socket(&self) -> PathBuf {
        self.runtime_dir.join("proxy-next.sock")
    }

    fn lock_file(&self) -> PathBuf {
        self.runtime_dir.join("proxy.lock")
    }

    fn security(&self) -> anyhow::Result<Security> {
        let secret = self.join_secret_file.as_deref().map(Secret::read).transpose()?;
        Ok(Security { secret, allow_plaintext: self.allow_plaintext })
    }
}

/// Arguments of `drover-agent proxy`, which the agent starts; not meant to be typed.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Address to listen on for HTTP.
    #[arg(long)]
    listen: SocketAddr,
    /// Port to try first when the port of --listen is 0.
    #[arg(long)]
    prefer_port: Option<u16>,
    /// Take over the listener of a proxy that is about to end, if one offers it.
    #[arg(long)]
    take_over: bool,
    /// Folder of the control socket.
    #[arg(long)]
    runtime_dir: PathBuf,
    /// Folder of the log.
    #[arg(long)]
    state_dir: PathBuf,
    /// File with the join secret.
    #[arg(long)]
    join_secret_file: Option<PathBuf>,
    /// Serve beyond loopback without encryption.
    #[arg(long)]
    allow_plaintext: bool,
    /// How long streams may go on after the proxy was told to end, in milliseconds.
    #[arg(long, default_value_t = DRAIN.as_millis() as u64)]
    drain_ms: u64,
    /// What is logged, in tracing's filter syntax.
    #[arg(long, default_value = "info")]
    log_filter: String,
}

impl Args {
    fn settings(&self) -> ProxySettings {
        ProxySettings {
            join_secret_file: self.join_secret_file.clone(),
            allow_plaintext: self.allow_plaintext,
            drain: Duration::from_millis(self.drain_ms),
            log_filter: self.log_filter.clone(),
            ..ProxySettings::new(self.listen, &self.runtime_dir, &self.state_dir)
        }
    }
}

/// The whole life of a proxy process: leaves its spawner's session, logs to standard error, serves until SIGTERM, SIGINT or
/// an order over the control socket, drains and returns. A signal hands the listener over to a successor first, where an agent
/// starts one: that is how a proxy is upgraded.
///
/// # Errors
/// The settings are refused, another proxy serves the same folder, or an address can't be bound.
pub async fn run(args: Args) -> anyhow::Result<()> {
    // Fails for the leader of a process group, as when typed into a shell: nothing depends on it then.
    let _ = nix::unistd::setsid();
    let settings = args.settings();
    own_log::init(&settings.log_filter)?;
    let ended = serve_until_told(&settings, args.prefer_port, args.take_over).await;
    if let Err(error) = &ended {
        // In one line, for the agent that looks for the reason.
        tracing::error!("{error:#}");
    }
    ended
}

async fn serve_until_told(settings: &ProxySettings, prefer_port: Option<u16>, take_over: bool) -> anyhow::Result<()> {
    let shutdown = CancellationToken::new();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .context("the proxy can't listen for SIGTERM")?;
    let proxy = match take_over {
        true => Proxy::take_over(settings, prefer_port).await?,
        false => Proxy::bind(settings, prefer_port)?,
    };
    let bounded = tokio::spawn(own_log::keep_bounded(settings.log_file()));
    let asked = shutdown.clone();
    let signals = tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        asked.cancel();
    });
    tracing::info!(address = %proxy.address(), version = drover_proto::VERSION, "the proxy serves");
    proxy.serve(shutdown).await;
    signals.abort();
    bounded.abort();
    tracing::info!("the proxy has ended");
    Ok(())
}

/// Serves in the calling process until SIGTERM, SIGINT or an order over the control socket, drains and returns.
///
/// # Errors
/// As [`run`].
pub async fn serve(settings: ProxySettings) -> anyhow::Result<()> {
    serve_until_told(&settings, None, false).await
}
