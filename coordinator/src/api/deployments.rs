//! Changes of deployments: each is one transaction on the record that was read.

use super::validate;
use crate::{
    control::{clock, events::Events, store_status, view::View},
    plan::snapshot::{Snapshot, Stored},
    store::{Compare, Store, Txn, keys, records},
};
use drover_proto::{
    ids, limits,
    status::{invalid_field, invalid_fields, reason, with_reason},
    store::v1 as record,
    v1::{ApplyDeploymentRequest, DeleteDeploymentRequest, DeploymentSpec, ScaleDeploymentRequest, Severity},
};
use std::time::Duration;
use tonic::{Code, Status};

/// Longest wait for the view to show what was just written, so that a caller reads its own write.
const CATCH_UP: Duration = Duration::from_secs(2);

/// Changes deployments.
#[derive(Debug, Clone)]
pub(super) struct Deployments {
    pub(super) store: Store,
    pub(super) view: View,
    pub(super) events: Events,
}

type Read = Option<Stored<record::Deployment>>;

impl Deployments {
    /// Returns the record as stored and whether it was changed.
    pub(super) async fn apply(&self, request: ApplyDeploymentRequest) -> Result<(record::Deployment, bool), Status> {
        let Some(spec) = request.spec else {
            return Err(invalid_field("spec", "is missing: say what must run"));
        };
        let violations = validate::spec(&spec, &self.view.snapshot());
        if !violations.is_empty() {
            return Err(invalid_fields(violations));
        }
        let now = self.read(&spec.name).await?;
        let (next, new_revision) = match &now {
            None => (create(&spec, request.generation)?, true),
            Some(now) => match change(&now.value, &spec, request.generation)? {
                Some(next) => next,
                None => return Ok((now.value.clone(), false)),
            },
        };
        let what = format!("generation {}, revision {}, {} replicas", next.generation, next.revision, next.replicas);
        self.write(&spec.name, now.as_ref(), &next, new_revision).await?;
        self.events.record(format!("deployment/{}", spec.name), "Applied", Severity::Info, what);
        Ok((next, true))
    }

    pub(super) async fn scale(&self, request: ScaleDeploymentRequest) -> Result<record::Deployment, Status> {
        check_name(&request.name)?;
        let replicas = match request.replicas {
            Some(n) if (0..=limits::REPLICAS_MAX).contains(&n) => n,
            Some(n) => {
                return Err(invalid_field(
                    "replicas",
                    format!("{n} is not allowed: use 0 to {}", limits::REPLICAS_MAX),
                ));
            }
            None => return Err(invalid_field("replicas", "is missing: say how many instances are wanted")),
        };
        let now = self.existing(&request.name, request.generation).await?;
        if now.value.replicas == replicas {
            return Ok(now.value);
        }
        let next = changed(record::Deployment { replicas, ..now.value.clone() });
        self.write(&request.name, Some(&now), &next, false).await?;
        let what = format!("from {} to {replicas} replicas", now.value.replicas);
        self.events.record(format!("deployment/{}", request.name), "Scaled", Severity::Info, what);
        Ok(next)
    }

    pub(super) async fn delete(&self, request: DeleteDeploymentRequest) -> Result<record::Deployment, Status> {
        check_name(&request.name)?;
        let now = match self.existing(&request.name, request.generation).await {
            // Deleting twice is no error: what was asked for is under way.
            Err(status) if drover_proto::status::reason_of(&status).as_deref() == Some(reason::DELETING) => {
                return self.read(&request.name).await?.map(|d| d.value).ok_or_else(|| not_found(&request.name));
            }
            other => other?,
        };
        let next = changed(record::Deployment { deleting: true, ..now.value.clone() });
        self.write(&request.name, Some(&now), &next, false).await?;
        self.events.record(format!("deployment/{}", request.name), "Deleting", Severity::Info, "asked for".to_owned());
        Ok(next)
    }

    async fn read(&self, name: &str) -> Result<Read, Status> {
        let Some(stored) = self.store.get(&keys::deployment(name)).await.map_err(store_status)? else {
            return Ok(None);
        };
        let value = records::decode(&stored).map_err(store_status)?;
        Ok(Some(Stored { value, create_revision: stored.create_revision, mod_revision: stored.mod_revision }))
    }

    async fn existing(&self, name: &str, generation: u64) -> Result<Stored<record::Deployment>, Status> {
        let now = self.read(name).await?.ok_or_else(|| not_found(name))?;
        if now.value.deleting {
            return Err(deleting(name));
        }
        check_generation(&now.value, generation)?;
        Ok(now)
    }

    async fn write(
        &self,
        name: &str,
        now: Option<&Stored<record::Deployment>>,
        next: &record::Deployment,
        new_revision: bool,
    ) -> Result<(), Status> {
        let mut then = vec![records::put(keys::deployment(name), next, 0)];
        if new_revision {
            let revision = record::Revision { spec: next.spec.clone(), created_at: Some(clock::now()) };
            then.push(records::put(keys::revision(name, next.revision), &revision, 0));
        }
        let schema = self.view.snapshot().schema.as_ref().map_or(0, |schema| schema.mod_revision);
        let compare = vec![
            Compare::ModRevision(keys::deployment(name), now.map_or(0, |n| n.mod_revision)),
            // Not in a store that has just come back empty.
            Compare::ModRevision(keys::SCHEMA.to_owned(), schema),
        ];
        let outcome = self.store.txn(Txn { compare, then, otherwise: vec![] }).await.map_err(store_status)?;
        if !outcome.succeeded {
            let what =
                format!("deployment {name} was changed by somebody else at the same moment: read it again and repeat");
            return Err(with_reason(Code::Aborted, reason::GENERATION_MISMATCH, what));
        }
        // Written is written; a view that lags only shows it later.
        let _ = self.view.at_least(outcome.revision, CATCH_UP).await;
        Ok(())
    }
}

fn create(spec: &DeploymentSpec, generation: u64) -> Result<record::Deployment, Status> {
    if generation != 0 {
        let what = format!(
            "deployment {} does not exist, the request names generation {generation}: send 0 to create it",
            spec.name
        );
        return Err(with_reason(Code::NotFound, reason::NOT_FOUND, what));
    }
    Ok(record::Deployment {
        spec: Some(spec.clone()),
        generation: 1,
        revision: 1,
        replicas: spec.replicas.unwrap_or(1),
        deleting: false,
        created_at: Some(clock::now()),
        updated_at: Some(clock::now()),
        traceparent: drover_telemetry::context::current_traceparent(),
    })
}

/// The changed record and whether it has a new revision; `None` when nothing would change.
fn change(
    now: &record::Deployment,
    spec: &DeploymentSpec,
    generation: u64,
) -> Result<Option<(record::Deployment, bool)>, Status> {
    if now.deleting {
        return Err(deleting(&spec.name));
    }
    if generation == 0 {
        let what = format!("deployment {} exists at generation {}: name it to change it", spec.name, now.generation);
        return Err(with_reason(Code::AlreadyExists, reason::ALREADY_EXISTS, what));
    }
    check_generation(now, generation)?;
    // A spec that does not speak of replicas leaves the number to ScaleDeployment.
    let replicas = spec.replicas.unwrap_or(now.replicas);
    if now.spec.as_ref() == Some(spec) && replicas == now.replicas {
        return Ok(None);
    }
    let new_revision = !same_process(now.spec.as_ref(), spec);
    let next = record::Deployment {
        spec: Some(spec.clone()),
        revision: now.revision + u64::from(new_revision),
        replicas,
        ..now.clone()
    };
    Ok(Some((changed(next), new_revision)))
}

/// Whether a running instance may go on under the new spec: only the number of replicas differs.
fn same_process(now: Option<&DeploymentSpec>, next: &DeploymentSpec) -> bool {
    now.is_some_and(|now| DeploymentSpec { replicas: next.replicas, ..now.clone() } == *next)
}

fn changed(next: record::Deployment) -> record::Deployment {
    record::Deployment {
        generation: next.generation + 1,
        updated_at: Some(clock::now()),
        traceparent: drover_telemetry::context::current_traceparent(),
        ..next
    }
}

fn check_generation(now: &record::Deployment, generation: u64) -> Result<(), Status> {
    if generation != 0 && generation != now.generation {
        let name = now.spec.as_ref().map_or("", |s| s.name.as_str());
        let what = format!(
            "deployment {name} is at generation {}, the request is based on {generation}: read it again and repeat the change",
            now.generation
        );
        return Err(with_reason(Code::Aborted, reason::GENERATION_MISMATCH, what));
    }
    Ok(())
}

pub(super) fn check_name(name: &str) -> Result<(), Status> {
    ids::check_deployment_name(name).map_err(|e| invalid_field("name", e.to_string()))
}

pub(super) fn not_found(name: &str) -> Status {
    with_reason(Code::NotFound, reason::NOT_FOUND, format!("there is no deployment {name}"))
}

fn deleting(name: &str) -> Status {
    let what = format!("deployment {name} is being deleted: wait until it is gone, then apply it anew");
    with_reason(Code::FailedPrecondition, reason::DELETING, what)
}

/// Deployments of a snapshot, for reading.
pub(super) fn find<'a>(snapshot: &'a Snapshot, name: &str) -> Result<&'a record::Deployment, Status> {
    check_name(name)?;
    snapshot.deployments.get(name).map(|d| &d.value).ok_or_else(|| not_found(name))
}
