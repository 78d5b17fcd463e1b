//! Checking the settings and opening connections.

use super::{Settings, error};
use crate::store::Error;
use etcd_client::{Client, ConnectOptions};
use std::time::Duration;
use tokio::time::timeout;

/// Refuses settings that can't work, naming field, value and way out.
pub(super) fn check(settings: &Settings) -> Result<(), Error> {
    let refuse = |what: String| Err(Error::Rejected(what));
    if settings.endpoints.is_empty() {
        return refuse("etcd_endpoints is empty: name at least one, as in [\"http://127.0.0.1:2379\"]".to_owned());
    }
    if let Some(endpoint) = settings.endpoints.iter().find(|e| e.starts_with("https://")) {
        return refuse(format!(
            "etcd_endpoints: \"{endpoint}\": TLS to etcd is not supported yet: use an http:// address"
        ));
    }
    let prefix = &settings.prefix;
    if !prefix.starts_with('/') || !prefix.ends_with('/') {
        return refuse(format!("the etcd prefix \"{prefix}\" must begin and end with '/', as \"/drover/\" does"));
    }
    let durations = [
        ("call_timeout", settings.call_timeout),
        ("connect_timeout", settings.connect_timeout),
        ("keep_alive", settings.keep_alive),
        ("watch_silence", settings.watch_silence),
    ];
    match durations.iter().find(|(_, value)| value.is_zero()) {
        Some((name, _)) => refuse(format!("{name} of etcd is 0: a wait needs a deadline, give at least 1 ms")),
        None => Ok(()),
    }
}

/// A client with a connection of its own. Nothing is sent before its first call, but for a log-in where a user is set.
pub(super) async fn client(settings: &Settings) -> Result<Client, Error> {
    let mut options = ConnectOptions::new()
        .with_connect_timeout(settings.connect_timeout)
        .with_keep_alive(settings.keep_alive, settings.keep_alive)
        .with_keep_alive_while_idle(false)
        .with_tcp_keepalive(settings.keep_alive.max(Duration::from_secs(1)))
        // Without it a member cut off from its cluster accepts calls and keeps watches silently open.
        .with_require_leader(true);
    if let Some((name, password)) = &settings.user {
        options = options.with_user(name, password).with_auto_token_refresh(true);
    }
    match timeout(settings.call_timeout, Client::connect(&settings.endpoints, Some(options))).await {
        Ok(Ok(client)) => Ok(client),
        Ok(Err(error @ (etcd_client::Error::InvalidUri(_) | etcd_client::Error::InvalidArgs(_)))) => {
            Err(Error::Rejected(format!("etcd_endpoints: {}: {error}", settings.endpoints.join(", "))))
        }
        Ok(Err(error)) => Err(unreachable(settings, &error::map(&error, error::Kind::Read, "log-in"))),
        Err(_) => Err(unreachable(settings, &error::silence(error::Kind::Read, "log-in", settings.call_timeout))),
    }
}

/// The error of a start without etcd.
pub(super) fn unreachable(settings: &Settings, error: &Error) -> Error {
    let endpoints = settings.endpoints.join(", ");
    match error {
        Error::Unavailable(why) => {
            Error::Unavailable(format!("no etcd answers at {endpoints} ({why}): start it, or correct etcd_endpoints"))
        }
        Error::Rejected(why) => Error::Rejected(format!("etcd at {endpoints}: {why}")),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_work_are_refused_by_name() {
        let good = Settings::new(vec!["http://127.0.0.1:2379".to_owned()]);
        assert!(check(&good).is_ok());
        let refused = |settings: Settings| check(&settings).unwrap_err().to_string();
        assert!(refused(Settings { endpoints: vec![], ..good.clone() }).contains("etcd_endpoints"));
        assert!(
            refused(Settings { endpoints: vec!["https://a:1".to_owned()], ..good.clone() }).contains("https://a:1")
        );
        assert!(refused(Settings { prefix: "drover/".to_owned(), ..good.clone() }).contains("\"drover/\""));
        assert!(refused(Settings { watch_silence: Duration::ZERO, ..good }).contains("watch_silence"));
    }

    #[test]
    fn a_password_is_not_shown() {
        let mut settings = Settings::new(vec!["http://127.0.0.1:2379".to_owned()]);
        settings.user = Some(("drover".to_owned(), "hunter2".to_owned()));
        let shown = format!("{settings:?}");
        assert!(shown.contains("drover") && !shown.contains("hunter2"), "{shown}");
    }
}
