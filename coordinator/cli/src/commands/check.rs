//! `drover check`: what must not be, as the hosts themselves say.

use super::{Context, fetch, processes};
use crate::{
    arguments::{Check, CheckCommand},
    failure::Failure,
    output::printable,
};
use drover_proto::v1::{CheckDuplicatesRequest, Duplicate, HostProcess, NodeFailure};
use serde_json::json;

/// Looks.
pub async fn run(context: &Context, options: &Check) -> Result<(), Failure> {
    match options.command {
        CheckCommand::Duplicates => duplicates(context).await,
    }
}

async fn duplicates(context: &Context) -> Result<(), Failure> {
    let client = context.client()?;
    let call = client.read(|mut fleet| async move { fleet.check_duplicates(CheckDuplicatesRequest {}).await });
    let answer = processes::shown("asking the nodes", call).await?;
    let output = &context.output;
    if output.is_json() {
        output.document(&json!({
            "duplicates": fetch::json_list("Duplicate", &answer.duplicates)?,
            "unreachable": fetch::json_list("NodeFailure", &answer.unreachable)?,
            "not_listed": fetch::json_list("NotListed", &answer.not_listed)?,
        }))?;
    } else {
        for duplicate in &answer.duplicates {
            for line in told(duplicate) {
                output.line(&printable(&line))?;
            }
        }
        processes::tell_missing(context, &answer.unreachable, &answer.not_listed);
    }
    outcome(answer.duplicates.len(), &answer.unreachable)?;
    output.notice("no instance has more than one llama-server");
    Ok(())
}

fn told(duplicate: &Duplicate) -> Vec<String> {
    let servers = duplicate.others.len() + usize::from(duplicate.keep.is_some());
    let mut lines = vec![format!("{}: {servers} servers; {}", duplicate.instance, duplicate.message)];
    lines.extend(duplicate.keep.iter().map(|process| format!("  keep   {}", shown(process))));
    lines.extend(duplicate.others.iter().map(|process| format!("  other  {}", shown(process))));
    lines
}

fn shown(process: &HostProcess) -> String {
    let token = process.token.map_or_else(|| "no token on record".to_owned(), |token| format!("token {token}"));
    format!("node {}, pid {}, {token}", process.node, process.pid)
}

fn outcome(duplicates: usize, unreachable: &[NodeFailure]) -> Result<(), Failure> {
    let hosts = unreachable.iter().map(|failure| failure.node.as_str()).collect::<Vec<_>>().join(", ");
    let not_looked_at = if hosts.is_empty() { String::new() } else { format!("not looked at: {hosts}") };
    match (duplicates, unreachable.is_empty()) {
        (0, true) => Ok(()),
        (0, false) => Err(Failure::Answered(not_looked_at)),
        (1, true) => Err(Failure::Answered("1 instance has more than one llama-server".to_owned())),
        (n, true) => Err(Failure::Answered(format!("{n} instances have more than one llama-server"))),
        (n, false) => Err(Failure::Answered(format!("{n} instances have more than one llama-server; {not_looked_at}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_proto::v1::Token;

    #[test]
    fn a_host_that_was_not_looked_at_is_no_success() {
        let away = NodeFailure { node: "a".to_owned(), message: "it is away".to_owned() };
        assert!(outcome(0, &[]).is_ok());
        assert!(outcome(0, std::slice::from_ref(&away)).is_err_and(|f| f.message() == Some("not looked at: a")));
        assert!(outcome(2, &[away]).is_err_and(|f| f.message().is_some_and(|m| m.contains("2") && m.contains("a"))));
    }

    #[test]
    fn each_server_is_named_with_its_host() {
        let process = |node: &str, pid, revision| HostProcess {
            node: node.to_owned(),
            pid,
            token: Some(Token { generation: 1, revision }),
            ..HostProcess::default()
        };
        let duplicate = Duplicate {
            instance: "m-1".to_owned(),
            keep: Some(process("b", 2, 9)),
            others: vec![process("a", 1, 5)],
            message: "why".to_owned(),
            ..Duplicate::default()
        };
        let lines = ["m-1: 2 servers; why", "  keep   node b, pid 2, token 1.9", "  other  node a, pid 1, token 1.5"];
        assert_eq!(told(&duplicate), lines);
    }
}
