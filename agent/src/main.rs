//! The agent's program: reads its configuration, starts, serves until a signal, ends. What it does is in the library.

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use drover_agent::{check, config::Flags, down, proxy, serve::Agent};
use drover_proto::transport::Target;
use std::{io::Write as _, process::ExitCode, sync::Arc, time::Duration};
use tokio::{
    runtime::Builder,
    signal::unix::{SignalKind, signal},
};

/// How long what was started in the background may take to end.
const RUNTIME_DEADLINE: Duration = Duration::from_secs(1);
/// How long spans may take to reach the coordinator at the end; what is left stays in the spool.
const TELEMETRY_DEADLINE: Duration = Duration::from_secs(2);

/// The agent of one GPU host.
#[derive(Debug, Parser)]
#[command(
    name = "drover-agent",
    version = drover_proto::VERSION,
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  drover-agent --config /etc/drover/agent.toml         run the agent of this host\n  \
                  drover-agent down --config /etc/drover/agent.toml    end what an ended agent has left running\n  \
                  drover-agent check --config /etc/drover/agent.toml   tell the state of its files"
)]
struct Command {
    #[command(flatten)]
    flags: Flags,
    #[command(subcommand)]
    subcommand: Option<Sub>,
}

#[derive(Debug, Subcommand)]
enum Sub {
    /// Run the agent (the default).
    Run(Box<Flags>),
    /// Run this host's data plane; started by the agent.
    #[command(hide = true)]
    Proxy(proxy::Args),
    /// End everything that the agent of this state folder has left running: servers, shims, proxy.
    Down(Box<Flags>),
    /// Tell the state of this node's files, and of the processes that they name, without changing anything.
    ///
    /// Exits with 0 when all is well, with 1 when something is damaged or does not fit together, and with 2 when the state
    /// folder is not named or not there. Works beside a running agent and on a file system that is mounted read-only.
    #[command(after_help = "Examples:\n  drover-agent check --config /etc/drover/agent.toml\n  \
                            drover-agent check --state-dir /var/lib/drover --output json")]
    Check(Box<check::Args>),
    /// Print the version.
    Version,
}

fn main() -> ExitCode {
    drover_proto::allocator::bound_arenas();
    let command = Command::parse();
    if matches!(command.subcommand, Some(Sub::Proxy(_))) {
        // It outlives the agent: whoever waits for the end of a pipe that the agent has inherited would wait for it too.
        // Nothing is open here yet but that.
        drover_shim::sys::close_from(3);
    }
    let runtime = match Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&anyhow::Error::new(error).context("runtime")),
    };
    let result = match command.subcommand {
        Some(Sub::Check(arguments)) => return runtime.block_on(check::run(*arguments)),
        None => runtime.block_on(run(command.flags)),
        Some(Sub::Run(flags)) => runtime.block_on(run(*flags)),
        Some(Sub::Proxy(arguments)) => runtime.block_on(proxy::run(arguments)),
        Some(Sub::Down(flags)) => runtime.block_on(async { down::down(&flags.places()?).await }),
        Some(Sub::Version) => {
            let _ = writeln!(std::io::stdout(), "drover-agent {}", drover_proto::VERSION);
            Ok(())
        }
    };
    runtime.shutdown_timeout(RUNTIME_DEADLINE);
    result.map_or_else(|error| failed(&error), |()| ExitCode::SUCCESS)
}

async fn run(flags: Flags) -> anyhow::Result<()> {
    let settings = flags.settings()?;
    let telemetry = drover_telemetry::init(drover_telemetry::Settings {
        program: "drover-agent",
        instance: settings.node.clone(),
        spool_dir: settings.state_dir.join("spool"),
        log_filter: settings.log_filter.clone(),
        log_json: settings.log_json,
        spool_bytes_max: settings.spool_bytes_max,
    })?;
    // Before anything is started: a signal that comes during the start is not lost.
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let spans = Target::new(&settings.coordinators, &settings.security, Some(&settings.node))?;
    telemetry.start_export(Arc::new(drover_telemetry::GrpcSink::new(spans)));

    let agent = Agent::start(settings, telemetry.handle()).await?;
    tracing::info!(version = drover_proto::VERSION, proxy = agent.proxy_address(), "the agent serves");
    let signalled = async {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    tokio::pin!(signalled);
    let cause = tokio::select! {
        cause = &mut signalled => cause,
        () = agent.ready() => signalled.await,
    };
    tracing::info!(cause, "the agent ends; servers and proxy go on");
    agent.end().await;
    telemetry.shutdown(TELEMETRY_DEADLINE).await;
    Ok(())
}

fn failed(error: &anyhow::Error) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "drover-agent: {error:#}");
    ExitCode::FAILURE
}
