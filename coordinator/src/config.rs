//! Configuration of the coordinator: TOML file, then environment `DROVER_…`, then flags. An unknown key is an error.

use anyhow::{Context as _, bail};
use clap::Parser;
use drover_proto::{
    limits,
    transport::{Secret, Security},
};
use serde::Deserialize;
use std::{net::SocketAddr, path::PathBuf, time::Duration};

/// Which store holds the truth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    /// etcd.
    Etcd,
    /// This process alone: for one coordinator on one machine, nothing survives its end.
    Memory,
}

/// The configuration file; every key has a default.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Id of this replica, unique among all. Default: host name and process id.
    pub id: String,
    /// Address of gRPC.
    pub grpc_listen: SocketAddr,
    /// Address of HTTP: gateway, health, metrics.
    pub http_listen: SocketAddr,
    /// Which store.
    pub store: StoreKind,
    /// Addresses of etcd.
    pub etcd_endpoints: Vec<String>,
    /// Prefix of every key, so that several fleets can share one etcd.
    pub etcd_prefix: String,
    /// Where spans wait that are not exported yet, and which store this is is written down.
    pub data_dir: PathBuf,
    /// Take the store as it is, though it is not the one used before.
    #[serde(skip)]
    pub new_store: bool,
    /// File that holds the join secret.
    pub join_secret_file: Option<PathBuf>,
    /// Accept and send the secret unencrypted beyond loopback.
    pub allow_plaintext: bool,
    /// The gateway.
    pub gateway: crate::gateway::Settings,
    /// Time to live of an agent's session, in milliseconds.
    pub session_ttl_ms: u64,
    /// How often agents send a heartbeat, in milliseconds.
    pub heartbeat_interval_ms: u64,
    /// Nodes that an offer names at most.
    pub offer_candidates: usize,
    /// Time from an offer to its deadline, in milliseconds.
    pub offer_deadline_ms: u64,
    /// Share of the nodes seen in the last hour that may be lost, in percent: above it nothing is replaced until they come back
    /// or an operator says so. 100: never frozen.
    pub freeze_share_percent: u32,
    /// Lost instances that may be claimed elsewhere at once.
    pub replace_burst: u32,
    /// Lost instances that may be claimed elsewhere a second, beyond the burst.
    pub replace_per_s: u32,
    /// Time without progress after which a node loses its claim on what is not ready, in milliseconds. A loading model has its
    /// deployment's load_timeout_ms besides. Agents tell of progress every 5 s, and their own deadline of a launch is 40 s.
    pub progress_deadline_ms: u64,
    /// Time after its first failure in which what a node has claimed has to become ready there, in milliseconds: after that the
    /// node loses its claim, if another one can take it.
    pub give_up_after_ms: u64,
    /// For how long a node is not offered an instance again whose claim it has lost in one of these ways, the first time, in
    /// milliseconds; doubled with every further time.
    pub avoid_first_ms: u64,
    /// The same, at most.
    pub avoid_max_ms: u64,
    /// What is logged: directives of tracing's EnvFilter.
    pub log_filter: String,
    /// Log lines as JSON.
    pub log_json: bool,
    /// Most bytes of spans that wait on disk.
    pub spool_bytes_max: u64,
    /// Written, as JSON, when everything listens: the real addresses.
    pub ready_file: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        let loopback = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Self {
            id: String::new(),
            grpc_listen: loopback(limits::ports::GRPC),
            http_listen: loopback(limits::ports::HTTP),
            store: StoreKind::Etcd,
            etcd_endpoints: vec!["http://127.0.0.1:2379".to_owned()],
            etcd_prefix: "/drover/".to_owned(),
            data_dir: PathBuf::from("/var/lib/drover/coordinator"),
            new_store: false,
            join_secret_file: None,
            allow_plaintext: false,
            gateway: crate::gateway::Settings::default(),
            session_ttl_ms: ms(limits::SESSION_TTL),
            heartbeat_interval_ms: ms(limits::HEARTBEAT_INTERVAL),
            offer_candidates: 3,
            offer_deadline_ms: 5000,
            freeze_share_percent: 55,
            replace_burst: 50,
            replace_per_s: 10,
            progress_deadline_ms: 120_000,
            give_up_after_ms: 60_000,
            avoid_first_ms: 60_000,
            avoid_max_ms: 600_000,
            log_filter: "info".to_owned(),
            log_json: false,
            spool_bytes_max: 64 << 20,
            ready_file: None,
        }
    }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The coordinator of Drover: API, placement, agent sessions, span audit and gateway.
#[derive(Debug, Parser)]
#[command(
    name = "drover-coordinator",
    version,
    after_help = "Example:\n  drover-coordinator --config /etc/drover/coordinator.toml\n  drover-coordinator --store memory --grpc-listen 127.0.0.1:7400"
)]
pub struct Args {
    /// Configuration file (TOML); flags and DROVER_… variables override it.
    #[arg(long, env = "DROVER_CONFIG")]
    config: Option<PathBuf>,
    /// Id of this replica, unique among all.
    #[arg(long, env = "DROVER_COORDINATOR_ID")]
    id: Option<String>,
    /// Address of gRPC.
    #[arg(long, env = "DROVER_GRPC_LISTEN")]
    grpc_listen: Option<SocketAddr>,
    /// Address of HTTP: gateway, health, metrics.
    #[arg(long, env = "DROVER_HTTP_LISTEN")]
    http_listen: Option<SocketAddr>,
    /// Which store holds the truth.
    #[arg(long, env = "DROVER_STORE")]
    store: Option<StoreKind>,
    /// Addresses of etcd, separated by commas.
    #[arg(long, env = "DROVER_ETCD_ENDPOINTS", value_delimiter = ',')]
    etcd_endpoints: Option<Vec<String>>,
    /// Prefix of every key in etcd.
    #[arg(long, env = "DROVER_ETCD_PREFIX")]
    etcd_prefix: Option<String>,
    /// Where spans wait that are not exported yet.
    #[arg(long, env = "DROVER_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// Take the store as it is, though it is empty, or not the one that this replica has used before: for one whose content
    /// is lost for good. End all servers first (drover-agent down on each host).
    #[arg(long)]
    new_store: bool,
    /// File that holds the join secret.
    #[arg(long, env = "DROVER_JOIN_SECRET_FILE")]
    join_secret_file: Option<PathBuf>,
    /// Accept and send the join secret unencrypted beyond loopback.
    #[arg(long, env = "DROVER_ALLOW_PLAINTEXT")]
    allow_plaintext: bool,
    /// What is logged, for example "info,drover_coordinator=debug". DROVER_LOG_FILTER, the agent's name for it, is read too.
    #[arg(long, env = "DROVER_LOG")]
    log_filter: Option<String>,
    /// Log lines as JSON.
    #[arg(long, env = "DROVER_LOG_JSON")]
    log_json: bool,
    /// File to write the real addresses to when everything listens.
    #[arg(long, env = "DROVER_READY_FILE")]
    ready_file: Option<PathBuf>,
}

impl Config {
    /// Reads the file, lays environment and flags over it, and checks the result.
    pub fn from_args(args: Args) -> anyhow::Result<Self> {
        let mut config: Self = drover_proto::config::load(args.config.as_deref())?;
        macro_rules! lay_over {
            ($($key:ident),*) => { $( if let Some(value) = args.$key { config.$key = value; } )* };
        }
        // The agent's name for it: one variable for both programs of a host.
        config.log_filter = std::env::var("DROVER_LOG_FILTER").unwrap_or(config.log_filter);
        lay_over!(id, grpc_listen, http_listen, store, etcd_endpoints, etcd_prefix, data_dir, log_filter);
        config.join_secret_file = args.join_secret_file.or(config.join_secret_file);
        config.ready_file = args.ready_file.or(config.ready_file);
        config.allow_plaintext |= args.allow_plaintext;
        config.log_json |= args.log_json;
        config.new_store = args.new_store;
        if config.id.is_empty() {
            let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            config.id = format!("{}-{}", host.trim(), std::process::id());
        }
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> anyhow::Result<()> {
        if self.session_ttl_ms < 2000 {
            bail!("session_ttl_ms = {}: etcd grants no lease under 2 s; use 2000 or more", self.session_ttl_ms);
        }
        if self.heartbeat_interval_ms == 0 || self.heartbeat_interval_ms * 2 > self.session_ttl_ms {
            bail!(
                "heartbeat_interval_ms = {}: must be at least 1 and at most half of session_ttl_ms ({})",
                self.heartbeat_interval_ms,
                self.session_ttl_ms
            );
        }
        if !(500..=600_000).contains(&self.offer_deadline_ms) {
            bail!("offer_deadline_ms = {}: use 500 to 600000", self.offer_deadline_ms);
        }
        if self.offer_candidates == 0 || self.offer_candidates > 1000 {
            bail!("offer_candidates = {}: use 1 to 1000", self.offer_candidates);
        }
        if !(1..=100).contains(&self.freeze_share_percent) {
            bail!("freeze_share_percent = {}: use 1 to 100", self.freeze_share_percent);
        }
        for (key, value) in [("replace_burst", self.replace_burst), ("replace_per_s", self.replace_per_s)] {
            if !(1..=100_000).contains(&value) {
                bail!("{key} = {value}: use 1 to 100000");
            }
        }
        self.check_progress()?;
        if self.store == StoreKind::Etcd && self.etcd_endpoints.is_empty() {
            bail!("etcd_endpoints: is empty; name at least one, for example http://127.0.0.1:2379");
        }
        Ok(())
    }

    fn check_progress(&self) -> anyhow::Result<()> {
        const DAY_MS: u64 = 86_400_000;
        // Twice what agents take to tell of it.
        let progress = self.progress_deadline_ms;
        if !(10_000..=DAY_MS).contains(&progress) {
            bail!("progress_deadline_ms = {progress}: agents tell of progress every 5 s; use 10000 to {DAY_MS}");
        }
        let times = [
            ("give_up_after_ms", self.give_up_after_ms),
            ("avoid_first_ms", self.avoid_first_ms),
            ("avoid_max_ms", self.avoid_max_ms),
        ];
        for (key, value) in times {
            if !(1000..=DAY_MS).contains(&value) {
                bail!("{key} = {value}: use 1000 to {DAY_MS}");
            }
        }
        if self.avoid_max_ms < self.avoid_first_ms {
            let (max, first) = (self.avoid_max_ms, self.avoid_first_ms);
            bail!("avoid_max_ms = {max}: is less than avoid_first_ms ({first}); use {first} or more");
        }
        Ok(())
    }

    /// Reads the secret.
    pub fn security(&self) -> anyhow::Result<Security> {
        let secret = self.join_secret_file.as_deref().map(Secret::read).transpose().context("join_secret_file")?;
        Ok(Security { secret, allow_plaintext: self.allow_plaintext })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_file(text: &str) -> anyhow::Result<Config> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file.as_file(), text.as_bytes()).unwrap();
        let args = ["drover-coordinator", "--config", file.path().to_str().unwrap(), "--http-listen", "127.0.0.1:0"];
        Config::from_args(Args::parse_from(args))
    }

    #[test]
    fn flags_beat_the_file_and_an_unknown_key_stops_the_program_with_file_line_and_key() {
        let config = from_file("grpc_listen = '127.0.0.1:1'\nhttp_listen = '127.0.0.1:2'\n").unwrap();
        assert_eq!((config.grpc_listen.port(), config.http_listen.port()), (1, 0));
        let error = from_file("store = 'memory'\nsesion_ttl_ms = 5\n").unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("sesion_ttl_ms"), "{error}");
        let error = from_file("session_ttl_ms = 5\n").unwrap_err().to_string();
        assert!(error.contains("session_ttl_ms = 5"), "{error}");
    }

    #[test]
    fn deadlines_of_progress_are_bounded_on_both_sides() {
        let refused = |text: &str| from_file(text).unwrap_err().to_string();
        for text in ["progress_deadline_ms = 9999", "give_up_after_ms = 0", "avoid_first_ms = 86400001"] {
            let error = refused(text);
            assert!(error.contains(text) && error.contains("use 1"), "{error}");
        }
        let error = refused("avoid_first_ms = 5000\navoid_max_ms = 4000\n");
        assert!(error.contains("avoid_max_ms = 4000") && error.contains("use 5000 or more"), "{error}");
        assert!(from_file("progress_deadline_ms = 10000\ngive_up_after_ms = 1000\n").is_ok());
    }
}
