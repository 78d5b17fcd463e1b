//! Which instance is served through which socket, and how many requests of each are in flight. No I/O.

use drover_proto::v1::Token;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::watch;

/// The way to one instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Id of the instance.
    pub instance: String,
    /// Token under which it runs; a lower one never replaces a higher one.
    #[serde(with = "token_text")]
    pub token: Token,
    /// Unix socket of its llama-server.
    pub socket: PathBuf,
    /// Folder of its logs (`server.log`, and rotated `server.log.1`, …).
    pub log_dir: PathBuf,
    /// Whether it takes requests.
    pub state: RouteState,
}

/// Whether an instance takes requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouteState {
    /// It does.
    Open,
    /// It finishes those in flight and takes no new ones.
    Draining,
    /// It does not (it loads, or has failed); only its logs are served.
    Closed,
}

/// Why a request was not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The instance is unknown here, or closed.
    NoRoute,
    /// It takes no new requests.
    Draining,
}

#[derive(Debug, Default)]
struct Inner {
    routes: BTreeMap<String, Arc<Route>>,
    /// Only instances with at least one.
    in_flight: BTreeMap<String, u64>,
}

/// The routes in force and the requests in flight. Admission and counting are one step under one lock: once a route is
/// draining, the count of its instance only falls.
#[derive(Debug)]
pub(super) struct Table {
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
}

/// One request in flight; counted until it is dropped.
#[derive(Debug)]
pub(super) struct InFlight {
    table: Arc<Table>,
    instance: String,
}

impl Table {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { inner: Mutex::default(), changed: watch::Sender::new(0) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it holds the lock; should it ever, the maps are still whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touch(&self) {
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Puts the full set of routes into force, except where the route in force has a higher token.
    pub(super) fn replace(&self, routes: Vec<Route>) {
        let mut inner = self.lock();
        let mut old = std::mem::take(&mut inner.routes);
        for route in routes {
            let route = match old.remove(&route.instance) {
                Some(stands) if stands.token > route.token => stands,
                Some(stands) if *stands == route => stands,
                _ => Arc::new(route),
            };
            let known = inner.routes.get(&route.instance);
            if known.is_none_or(|known| known.token <= route.token) {
                inner.routes.insert(route.instance.clone(), route);
            }
        }
        drop(inner);
        self.touch();
    }

    /// Admits a request for an instance and counts it.
    pub(super) fn admit(self: &Arc<Self>, instance: &str) -> Result<(Arc<Route>, InFlight), Refusal> {
        let mut inner = self.lock();
        let route = inner.routes.get(instance).ok_or(Refusal::NoRoute)?.clone();
        match route.state {
            RouteState::Open => {}
            RouteState::Draining => return Err(Refusal::Draining),
            RouteState::Closed => return Err(Refusal::NoRoute),
        }
        *inner.in_flight.entry(instance.to_owned()).or_default() += 1;
        drop(inner);
        self.touch();
        Ok((route, InFlight { table: self.clone(), instance: instance.to_owned() }))
    }

    /// The route of an instance, whatever its state.
    pub(super) fn route(&self, instance: &str) -> Option<Arc<Route>> {
        self.lock().routes.get(instance).cloned()
    }

    /// Requests in flight; instances without any are left out.
    pub(super) fn in_flight(&self) -> BTreeMap<String, u64> {
        self.lock().in_flight.clone()
    }

    /// Told of every change of routes or counts.
    pub(super) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut inner = self.table.lock();
        if let Some(count) = inner.in_flight.get_mut(&self.instance) {
            *count -= 1;
            if *count == 0 {
                inner.in_flight.remove(&self.instance);
            }
        }
        drop(inner);
        self.table.touch();
    }
}

/// A token as its text, `<generation>.<revision>`.
mod token_text {
    use drover_proto::v1::Token;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(token: &Token, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(token)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Token, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(instance: &str, revision: i64, state: RouteState) -> Route {
        Route {
            instance: instance.to_owned(),
            token: Token { generation: 1, revision },
            socket: format!("/run/{instance}-{revision}.sock").into(),
            log_dir: "/log".into(),
            state,
        }
    }

    #[test]
    fn a_lower_token_never_replaces_a_higher_one() {
        let table = Table::new();
        table.replace(vec![route("a", 7, RouteState::Open), route("b", 7, RouteState::Open)]);
        table.replace(vec![route("a", 6, RouteState::Draining), route("b", 8, RouteState::Open)]);
        assert_eq!(table.route("a").unwrap().token.revision, 7);
        assert_eq!(table.route("a").unwrap().state, RouteState::Open);
        assert_eq!(table.route("b").unwrap().token.revision, 8);
        let restored = Route { token: Token { generation: 2, revision: 1 }, ..route("a", 0, RouteState::Open) };
        table.replace(vec![restored]);
        assert_eq!(table.route("a").unwrap().token.generation, 2, "a later store generation is higher");
        assert!(table.route("b").is_none(), "what the set leaves out is gone");
        // Two routes of one instance in one set: the higher token wins in either order.
        table.replace(vec![route("c", 2, RouteState::Open), route("c", 1, RouteState::Open)]);
        assert_eq!(table.route("c").unwrap().token.revision, 2);
    }

    #[test]
    fn only_open_routes_admit_and_requests_are_counted_until_dropped() {
        let table = Table::new();
        assert_eq!(table.admit("a").unwrap_err(), Refusal::NoRoute);
        table.replace(vec![route("a", 1, RouteState::Open), route("c", 1, RouteState::Closed)]);
        assert_eq!(table.admit("c").unwrap_err(), Refusal::NoRoute);
        let (_, first) = table.admit("a").unwrap();
        let (_, second) = table.admit("a").unwrap();
        table.replace(vec![route("a", 1, RouteState::Draining)]);
        assert_eq!(table.admit("a").unwrap_err(), Refusal::Draining);
        assert_eq!(table.in_flight(), BTreeMap::from([("a".to_owned(), 2)]));
        drop(first);
        table.replace(vec![]);
        assert_eq!(table.in_flight(), BTreeMap::from([("a".to_owned(), 1)]), "counted though its route is gone");
        drop(second);
        assert_eq!(table.in_flight(), BTreeMap::new());
    }

    #[test]
    fn a_route_reads_back_from_its_text() {
        let before = route("a", 7, RouteState::Draining);
        let text = serde_json::to_string(&before).unwrap();
        assert!(text.contains(r#""token":"1.7""#) && text.contains(r#""state":"draining""#), "{text}");
        assert_eq!(serde_json::from_str::<Route>(&text).unwrap(), before);
    }
}
