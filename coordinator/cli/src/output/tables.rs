//! Rows of the tables that people see. Pure: messages and the time in, text and tone out.

use super::Tone;
use crate::clock;
use drover_proto::v1::{
    Deployment, Event, HostProcess, Instance, InstanceState, Node, ProcessAction, ProcessOwner, ProcessResult, Severity,
};

/// A row of a table.
pub type Row = Vec<(String, Tone)>;

/// Columns of [`deployments`].
pub const DEPLOYMENTS: [&str; 7] = ["NAME", "MODEL", "READY", "GENERATION", "REVISION", "AGE", "MESSAGE"];
/// Columns of [`instances`].
pub const INSTANCES: [&str; 8] = ["ID", "STATE", "NODE", "TOKEN", "PID", "RESTARTS", "FOR", "MESSAGE"];
/// Columns of [`nodes`].
pub const NODES: [&str; 9] =
    ["NAME", "STATE", "INSTANCES", "MEMORY FREE", "CPUS", "GPUS", "PROXY", "FOR", "LABELS / MESSAGE"];

/// Columns of [`processes`].
pub const PROCESSES: [&str; 9] =
    ["NODE", "PID", "OWNER", "INSTANCE", "MEMORY", "GPU MEMORY", "AGE", "MODEL", "COMMAND / MESSAGE"];
/// Columns of [`results`].
pub const RESULTS: [&str; 7] = ["NODE", "PID", "OWNER", "INSTANCE", "MODEL", "ACTION", "MESSAGE"];

/// Deployments, one a row.
#[must_use]
pub fn deployments(list: &[Deployment], now_seconds: i64) -> Vec<Row> {
    list.iter().map(|d| deployment(d, now_seconds)).collect()
}

fn deployment(d: &Deployment, now_seconds: i64) -> Row {
    let spec = d.spec.clone().unwrap_or_default();
    let complete = !d.deleting && d.ready_replicas >= d.replicas;
    let tone = if complete { Tone::Good } else { Tone::Busy };
    let message = if d.deleting && d.message.is_empty() { "being deleted".to_owned() } else { d.message.clone() };
    vec![
        plain(&spec.name),
        plain(if spec.model.is_empty() { &spec.name } else { &spec.model }),
        (format!("{}/{}", d.ready_replicas, d.replicas), tone),
        plain(d.generation),
        plain(d.revision),
        plain(since(d.created_at.as_ref(), now_seconds)),
        plain(message),
    ]
}

/// Instances, one a row.
#[must_use]
pub fn instances(list: &[Instance], now_seconds: i64) -> Vec<Row> {
    list.iter()
        .map(|i| {
            let token = i.token.map_or_else(|| "-".to_owned(), |t| format!("{}.{}", t.generation, t.revision));
            vec![
                plain(&i.id),
                (state_word(i.state()), state_tone(i.state())),
                plain(or_dash(&i.node)),
                plain(token),
                plain(if i.pid > 0 { i.pid.to_string() } else { "-".to_owned() }),
                plain(i.restarts),
                plain(since(i.since.as_ref(), now_seconds)),
                plain(&i.message),
            ]
        })
        .collect()
}

/// Nodes, one a row.
#[must_use]
pub fn nodes(list: &[Node], now_seconds: i64) -> Vec<Row> {
    list.iter()
        .map(|n| {
            let capacity = n.capacity.clone().unwrap_or_default();
            let (state, tone) = match (n.connected, &n.absent_until) {
                (true, None) => ("connected", Tone::Good),
                (true, Some(_)) => ("away", Tone::Busy),
                (false, _) => ("gone", Tone::Bad),
            };
            let free = capacity.memory_bytes.saturating_sub(n.reserved_bytes);
            let mut labels: Vec<String> = n.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
            labels.sort_unstable();
            labels.extend((!n.message.is_empty()).then(|| n.message.clone()));
            vec![
                plain(&n.name),
                (state.to_owned(), tone),
                plain(n.instances),
                plain(format!("{} of {}", bytes(free), bytes(capacity.memory_bytes))),
                plain(capacity.cpus),
                plain(capacity.gpus.len()),
                plain(or_dash(&n.proxy_address)),
                plain(since(n.since.as_ref(), now_seconds)),
                plain(labels.join(" ")),
            ]
        })
        .collect()
}

/// Processes of the hosts, one a row.
#[must_use]
pub fn processes(list: &[HostProcess]) -> Vec<Row> {
    list.iter()
        .map(|p| {
            let said = if p.message.is_empty() { &p.command_line } else { &p.message };
            vec![
                plain(&p.node),
                plain(p.pid),
                owner(p.owner()),
                plain(or_dash(&p.instance)),
                plain(if p.rss_bytes > 0 { bytes(p.rss_bytes) } else { "-".to_owned() }),
                plain(if p.gpu_memory_known { bytes(p.gpu_memory_bytes) } else { "-".to_owned() }),
                plain(clock::age(p.age_ms / 1000)),
                plain(or_dash(&p.model_path)),
                plain(said),
            ]
        })
        .collect()
}

/// What was done to processes, or would be, one a row.
#[must_use]
pub fn results(list: &[ProcessResult]) -> Vec<Row> {
    list.iter()
        .map(|r| {
            let p = r.process.clone().unwrap_or_default();
            let action = r.action().as_str_name().trim_start_matches("PROCESS_ACTION_").replace('_', " ");
            let tone = match r.action() {
                ProcessAction::Ended => Tone::Good,
                ProcessAction::WouldEnd | ProcessAction::Draining => Tone::Busy,
                _ => Tone::Bad,
            };
            vec![
                plain(or_dash(&p.node)),
                plain(if p.pid > 0 { p.pid.to_string() } else { "-".to_owned() }),
                owner(p.owner()),
                plain(or_dash(&p.instance)),
                plain(or_dash(&p.model_path)),
                (action, tone),
                plain(&r.message),
            ]
        })
        .collect()
}

fn owner(owner: ProcessOwner) -> (String, Tone) {
    let word = owner.as_str_name().trim_start_matches("PROCESS_OWNER_").replace('_', " ");
    let tone = match owner {
        ProcessOwner::Owned => Tone::Good,
        ProcessOwner::Stale | ProcessOwner::Foreign => Tone::Busy,
        ProcessOwner::OtherAgent => Tone::Plain,
        ProcessOwner::Unknown | ProcessOwner::Unspecified => Tone::Bad,
    };
    (word, tone)
}

/// An event as a line for people, and its tone.
#[must_use]
pub fn event(e: &Event) -> (String, Tone) {
    let tone = match e.severity() {
        Severity::Error => Tone::Bad,
        Severity::Warning => Tone::Busy,
        Severity::Info | Severity::Unspecified => Tone::Plain,
    };
    let text = format!("{}  {}  {}  {}", clock::utc(e.time.as_ref()), e.object, e.reason, e.message);
    (super::printable(text.trim_end()), tone)
}

/// A state in capitals, without the prefix of the contract.
#[must_use]
pub fn state_word(state: InstanceState) -> String {
    state.as_str_name().trim_start_matches("INSTANCE_STATE_").to_owned()
}

fn state_tone(state: InstanceState) -> Tone {
    match state {
        InstanceState::Ready => Tone::Good,
        InstanceState::Failed | InstanceState::Backoff | InstanceState::Suspect => Tone::Bad,
        InstanceState::Unspecified | InstanceState::Stopped => Tone::Plain,
        _ => Tone::Busy,
    }
}

/// A number of bytes with a binary unit and three digits or so: "480 KiB", "1.5 GiB".
#[must_use]
pub fn bytes(n: i64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if n.unsigned_abs() < 1024 {
        return format!("{n} B");
    }
    #[allow(clippy::cast_precision_loss, reason = "shown with two digits")]
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    while value.abs() >= 1024.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(value.abs() < 10.0);
    format!("{value:.digits$} {}", UNITS[unit])
}

fn since(time: Option<&prost_types::Timestamp>, now_seconds: i64) -> String {
    time.map_or_else(|| "-".to_owned(), |t| clock::age(now_seconds.saturating_sub(t.seconds)))
}

fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

fn plain(value: impl ToString) -> (String, Tone) {
    (value.to_string(), Tone::Plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_proto::v1::{Capacity, DeploymentSpec, Token};

    fn text(row: &Row) -> Vec<&str> {
        row.iter().map(|(text, _)| text.as_str()).collect()
    }

    #[test]
    fn a_deployment_shows_ready_of_wanted_and_why_not() {
        let spec = DeploymentSpec { name: "tiny".into(), ..Default::default() };
        let d = Deployment {
            spec: Some(spec),
            generation: 3,
            revision: 1,
            replicas: 2,
            ready_replicas: 1,
            message: "1 instance loads".into(),
            created_at: Some(prost_types::Timestamp { seconds: 100, nanos: 0 }),
            ..Default::default()
        };
        let rows = deployments(std::slice::from_ref(&d), 165);
        assert_eq!(text(&rows[0]), ["tiny", "tiny", "1/2", "3", "1", "1m05s", "1 instance loads"]);
        assert_eq!((rows[0].len(), rows[0][2].1), (DEPLOYMENTS.len(), Tone::Busy));
        let deleting = Deployment { deleting: true, message: String::new(), ..d };
        assert_eq!(deployments(&[deleting], 165)[0][6].0, "being deleted");
    }

    #[test]
    fn an_instance_without_owner_shows_dashes() {
        let pending = Instance { id: "tiny-x".into(), state: InstanceState::Pending.into(), ..Default::default() };
        let owned = Instance {
            state: InstanceState::Ready.into(),
            node: "a".into(),
            token: Some(Token { generation: 1, revision: 42 }),
            pid: 7,
            ..pending.clone()
        };
        let rows = instances(&[pending, owned], 0);
        assert_eq!(text(&rows[0]), ["tiny-x", "PENDING", "-", "-", "-", "0", "-", ""]);
        assert_eq!(text(&rows[1]), ["tiny-x", "READY", "a", "1.42", "7", "0", "-", ""]);
        assert_eq!((rows[0].len(), rows[1][1].1), (INSTANCES.len(), Tone::Good));
    }

    #[test]
    fn a_node_shows_what_is_left_of_it() {
        let node = Node {
            name: "a".into(),
            connected: true,
            labels: [("zone".to_owned(), "x".to_owned()), ("gpu".to_owned(), "none".to_owned())].into(),
            capacity: Some(Capacity { memory_bytes: 8 << 30, cpus: 4, gpus: vec![] }),
            reserved_bytes: 2 << 30,
            message: "disk full".into(),
            ..Default::default()
        };
        let rows = nodes(&[node], 0);
        assert_eq!(
            text(&rows[0]),
            ["a", "connected", "0", "6.0 GiB of 8.0 GiB", "4", "0", "-", "-", "gpu=none zone=x disk full"]
        );
        assert_eq!(rows[0].len(), NODES.len());
    }

    #[test]
    fn a_process_shows_whose_it_is_and_a_result_what_was_done() {
        let process = HostProcess {
            node: "a".into(),
            pid: 7,
            owner: ProcessOwner::OtherAgent.into(),
            rss_bytes: 1 << 20,
            age_ms: 65_000,
            command_line: "llama-server -m x".into(),
            ..Default::default()
        };
        let rows = processes(std::slice::from_ref(&process));
        assert_eq!(text(&rows[0]), ["a", "7", "OTHER AGENT", "-", "1.0 MiB", "-", "1m05s", "-", "llama-server -m x"]);
        assert_eq!(rows[0].len(), PROCESSES.len());
        let gpu = |gpu_memory_bytes| HostProcess { gpu_memory_known: true, gpu_memory_bytes, ..process.clone() };
        let cells = processes(&[gpu(0), gpu(1 << 30)]);
        assert_eq!((cells[0][5].0.as_str(), cells[1][5].0.as_str()), ("0 B", "1.0 GiB"), "known, unlike above");
        let result = ProcessResult {
            process: Some(process),
            action: ProcessAction::LeftAlone.into(),
            message: "not ours".into(),
        };
        let rows = results(&[result]);
        assert_eq!(text(&rows[0]), ["a", "7", "OTHER AGENT", "-", "-", "LEFT ALONE", "not ours"]);
        assert_eq!((rows[0].len(), rows[0][5].1), (RESULTS.len(), Tone::Bad));
    }

    #[test]
    fn sizes_have_binary_units() {
        let sizes = [0, 1023, 1024, 491_520, 24 << 20, 3 << 39, -2048].map(bytes);
        assert_eq!(sizes, ["0 B", "1023 B", "1.0 KiB", "480 KiB", "24 MiB", "1.5 TiB", "-2.0 KiB"]);
    }

    #[test]
    fn an_event_is_one_safe_line() {
        let e = Event {
            object: "node/a".into(),
            reason: "Joined".into(),
            message: "hello\u{1b}[2J".into(),
            severity: Severity::Warning.into(),
            ..Default::default()
        };
        assert_eq!(event(&e), ("-  node/a  Joined  hello\u{fffd}[2J".to_owned(), Tone::Busy));
    }
}
