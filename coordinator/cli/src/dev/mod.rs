//! `drover dev`: a whole fleet on this machine, until Ctrl-C.
//!
//! Owns the order of things and their end: whether a step failed, a program died or a signal came, everything that was
//! started is ended, and a second Ctrl-C only hurries that. All it starts are the real programs, as they run elsewhere.

mod cluster;
mod config;
mod etcd;
mod first;
mod place;
mod process;
mod programs;
mod signals;

use crate::{
    arguments::{Dev, Store},
    client::Client,
    commands::Context,
    failure::Failure,
    progress::Progress,
};
use cluster::{Addresses, Cluster};
use futures::FutureExt as _;
use std::panic::AssertUnwindSafe;

/// Runs the fleet to its end.
pub async fn run(context: &Context, options: &Dev) -> Result<(), Failure> {
    let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(ToOwned::to_owned)).unwrap_or_default();
    let programs = programs::find(&beside, &programs::Environment::of_process(), options.store)?;
    if programs.etcd.is_none() && options.store != Some(Store::Memory) {
        context.output.notice("no etcd is installed (Debian: apt install etcd-server), so the store is in memory");
    }
    // A secret that can't be read is better told before anything runs.
    context.security()?;
    let secret = context.global.join_secret_file.as_ref().map(std::path::absolute).transpose()?;
    let mut signals = signals::Signals::listen().map_err(|e| Failure::Answered(format!("signals: {e}")))?;
    let model = first::check_model(options.model.as_deref())?;
    let place = place::Place::make(options.data_dir.as_deref())?;
    let (mut cluster, mut deaths) = Cluster::new(place, programs, secret);

    let progress = Progress::begin();
    let fleet = AssertUnwindSafe(live(context, options, model, &mut cluster, &progress)).catch_unwind();
    let result = tokio::select! {
        result = Box::pin(fleet) => {
            result.unwrap_or_else(|_| Err(Failure::Answered("drover dev failed: this is a bug of it".to_owned())))
        }
        Some(obituary) = deaths.recv() => Err(Failure::Answered(obituary)),
        signal = signals.first() => Err(Failure::Interrupted(signal)),
    };
    let ready = cluster.ready;
    // Told at once: what follows may take a while.
    if let Some(message) = result.as_ref().err().and_then(Failure::message) {
        progress.done(message.lines().next().unwrap_or_default());
        if !options.keep && options.data_dir.is_none() {
            progress.done("the logs go with the temporary folder: --keep keeps them");
        }
    }
    progress.resume("ending everything");
    let problems = cluster.end(&signals.hurry(), options.keep, &progress).await;
    progress.end();
    if !problems.is_empty() {
        return Err(Failure::Answered(format!("not everything was ended: {}", problems.join("; "))));
    }
    match result {
        // Ctrl-C is how a fleet that runs is ended.
        Err(Failure::Interrupted(_)) if ready && !options.once => Ok(()),
        other => other,
    }
}

/// Starts everything, shows how to use it, and waits; with `--once`, uses it and returns.
async fn live(
    context: &Context,
    options: &Dev,
    model: first::Model,
    cluster: &mut Cluster,
    progress: &Progress,
) -> Result<(), Failure> {
    let model = model.put(&cluster.place.data.join("models"))?;
    let etcd = cluster.start_etcd(progress).await?;
    let addresses = cluster.start_coordinator(etcd, (options.grpc_port, options.http_port), progress).await?;
    let nodes = cluster.start_agents(options.nodes, &addresses, &model.root, progress).await?;
    let security = context.security()?;
    let client = Client::new(std::slice::from_ref(&addresses.grpc), &security)?;
    first::deploy(&client, &model, options, progress).await?;
    cluster.ready = true;
    progress.end();
    show(context, cluster, &addresses, &model.name, &nodes)?;
    if options.once {
        return first::try_out(context, &client, &addresses, &model.name).await;
    }
    std::future::pending().await
}

/// Addresses, and three commands to try.
fn show(
    context: &Context,
    cluster: &Cluster,
    addresses: &Addresses,
    name: &str,
    nodes: &[(String, String)],
) -> Result<(), Failure> {
    let (grpc, http, data) = (&addresses.grpc, &addresses.http, cluster.place.data.display());
    if context.output.is_json() {
        let nodes: Vec<_> = nodes.iter().map(|(n, p)| serde_json::json!({ "name": n, "proxy": p })).collect();
        return context.output.json_line(&serde_json::json!({
            "grpc": grpc, "http": http, "deployment": name, "data_dir": data.to_string(), "nodes": nodes,
        }));
    }
    let mut drover = std::env::args().next().unwrap_or_else(|| "drover".to_owned());
    if let Some(file) = &context.global.join_secret_file {
        drover.push_str(&format!(" --join-secret-file {}", file.display()));
    }
    let proxies: Vec<String> = nodes.iter().map(|(node, proxy)| format!("{node} {proxy}")).collect();
    context.output.line(&format!(
        "\n\
         Drover is ready.\n\
         \x20 gRPC      {grpc}\n\
         \x20 gateway   http://{http}/v1   (OpenAI-compatible)\n\
         \x20 proxies   {}\n\
         \x20 data      {data}   (logs in logs/)\n\
         \n\
         Try:\n\
         \x20 {drover} get instances --coordinators {grpc}\n\
         \x20 {drover} chat {name} \"Hello\" --max-tokens 40 --gateway {http}\n\
         \x20 {drover} scale {name} 4 --wait --coordinators {grpc}\n",
        proxies.join(", ")
    ))
}
