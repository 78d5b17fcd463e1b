//! The commands, one a file.

pub mod apply;
pub mod chat;
pub mod check;
pub mod completions;
pub mod delete;
pub mod end_absence;
pub mod events;
pub mod fetch;
pub mod freeze;
pub mod get;
pub mod logs;
pub mod processes;
pub mod release;
pub mod remove_node;
pub mod scale;
pub mod version;

use crate::{
    arguments::{Command, Global},
    client::{self, Client},
    failure::Failure,
    output::Output,
};

/// What every command works with.
#[derive(Debug)]
pub struct Context {
    /// Options of every command.
    pub global: Global,
    /// Where results go.
    pub output: Output,
}

impl Context {
    /// A client for the coordinators of the command line.
    pub fn client(&self) -> Result<Client, Failure> {
        Client::new(&self.global.coordinators, &self.security()?)
    }

    /// Identity from the options.
    pub fn security(&self) -> Result<drover_proto::transport::Security, Failure> {
        client::security(self.global.join_secret_file.as_deref(), self.global.allow_plaintext)
    }
}

/// Runs one command to its end. `dev` handles signals itself; every other one ends at Ctrl-C.
pub async fn run(context: Context, command: Command) -> Result<(), Failure> {
    if let Command::Dev(options) = command {
        return crate::dev::run(&context, &options).await;
    }
    tokio::select! {
        result = Box::pin(one(&context, command)) => result,
        // Should no handler be possible, the default action of the signal remains.
        Ok(()) = tokio::signal::ctrl_c() => Err(Failure::Interrupted(2)),
        () = crate::output::reader_left() => Err(Failure::ReaderLeft),
    }
}

async fn one(context: &Context, command: Command) -> Result<(), Failure> {
    match command {
        Command::Apply(options) => apply::run(context, &options).await,
        Command::Get(options) => get::run(context, &options).await,
        Command::Scale(options) => scale::run(context, &options).await,
        Command::Delete(options) => delete::run(context, &options).await,
        Command::Logs(options) => logs::run(context, &options).await,
        Command::Events(options) => events::run(context, &options).await,
        Command::Processes(options) => processes::run(context, &options).await,
        Command::Check(options) => check::run(context, &options).await,
        Command::Freeze(options) => freeze::run(context, &options).await,
        Command::Release(options) => release::run(context, &options).await,
        Command::EndAbsence(options) => end_absence::run(context, &options).await,
        Command::RemoveNode(options) => remove_node::run(context, &options).await,
        Command::Chat(options) => chat::run(context, &options).await,
        Command::Dev(options) => crate::dev::run(context, &options).await,
        Command::Version => version::run(context),
        Command::Completions(options) => completions::run(context, &options),
    }
}
