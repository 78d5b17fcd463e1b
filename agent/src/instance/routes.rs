//! Which requests reach which instance: keeps the full set of routes and gives it to the proxy.

use super::machine::DataPlane;
use crate::proxy::Route;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// How long a change may take to be in force before its consequences are reported all the same: a proxy that is away is
/// started again within a second and given the routes then.
const APPLY_DEADLINE: Duration = Duration::from_secs(2);

/// The routes of this node.
#[derive(Debug)]
pub struct Routes {
    proxy: Arc<dyn DataPlane>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    routes: BTreeMap<String, Route>,
    /// Before all instances are taken back a set would leave some out, and the proxy would turn their requests away.
    announced: bool,
}

impl Routes {
    /// Routes through this proxy. It keeps those that it has until [`Routes::announce`].
    #[must_use]
    pub fn new(proxy: Arc<dyn DataPlane>) -> Self {
        Self { proxy, inner: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it holds the lock; should it ever, the map is still whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a route in without telling the proxy yet.
    pub fn prepare(&self, route: Route) {
        self.lock().routes.insert(route.instance.clone(), route);
    }

    /// Whether this very route is in the set.
    #[must_use]
    pub fn has(&self, route: &Route) -> bool {
        self.lock().routes.get(&route.instance) == Some(route)
    }

    /// Gives the proxy the set as it is, now and with every change from now on.
    pub fn announce(&self) {
        self.lock().announced = true;
        self.tell();
    }

    fn tell(&self) {
        let inner = self.lock();
        if inner.announced {
            self.proxy.set_routes(inner.routes.values().cloned().collect());
        }
    }

    /// Sets an instance's route and waits until it is in force; before [`Routes::announce`] it is only taken in.
    pub async fn set(&self, route: Route) {
        let instance = route.instance.clone();
        self.prepare(route);
        self.tell();
        if !self.proxy.wait_applied(APPLY_DEADLINE).await {
            tracing::warn!(instance, "the proxy has not taken the route yet; it is given it when it answers again");
        }
    }

    /// Removes an instance's route.
    pub fn remove(&self, instance: &str) {
        self.lock().routes.remove(instance);
        self.tell();
    }

    /// Waits until an instance whose route takes no requests has none in flight; false when it still has at the end.
    pub async fn wait_drained(&self, instance: &str, within: Duration) -> bool {
        self.proxy.wait_drained(instance, within).await
    }
}
