//! Clients of the gateway: plain requests and streams all the while, some of them left early.
//!
//! A request to the steady deployment must be answered whole. One to a deployment that comes and goes may be refused or
//! break, but it must end, and a stream that breaks must say so.

use super::{Faults, STEADY};
use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use drover_tests::gateway::Gateway;
use http_body_util::BodyExt as _;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde_json::{Value, json};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};

/// Clients of the steady deployment, and of the others.
const STEADY_CLIENTS: u64 = 2;
const CHURN_CLIENTS: u64 = 1;
/// A request that takes longer hangs.
const REQUEST_DEADLINE: Duration = Duration::from_secs(60);
/// Longest pause between two requests of a client, in milliseconds.
const PAUSE_MAX_MS: u64 = 400;
/// What may become of a request to a deployment that is just changed, deleted or killed.
const REFUSALS: [u16; 5] = [404, 429, 502, 503, 504];

/// What became of the requests.
#[derive(Debug, Clone, Copy, Default)]
pub struct Requests {
    /// Answered whole, to the steady deployment.
    pub steady: u64,
    /// Answered whole, to others.
    pub others: u64,
    /// Left by the client before the end.
    pub left: u64,
    /// Refused or broken as they may be.
    pub refused: u64,
    /// Failed, and must not.
    pub failed: u64,
}

/// The clients, until they are stopped.
#[derive(Debug)]
pub struct Clients {
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
    models: watch::Sender<Vec<String>>,
    done: Arc<Mutex<Requests>>,
}

/// What became of one request.
#[derive(Debug)]
enum End {
    Whole,
    Left,
    Refused,
}

impl Clients {
    /// Starts them.
    pub fn start(gateways: &[String], seed: u64, faults: &Faults) -> Self {
        let (stop, models) = (watch::Sender::new(false), watch::Sender::new(Vec::new()));
        let done = Arc::new(Mutex::new(Requests::default()));
        let mut tasks = JoinSet::new();
        for n in 0..STEADY_CLIENTS + CHURN_CLIENTS {
            let client = Client {
                gateways: gateways.iter().map(|address| Gateway::new(address)).collect(),
                random: StdRng::seed_from_u64(seed ^ (n + 1) << 32),
                models: (n >= STEADY_CLIENTS).then(|| models.subscribe()),
                faults: faults.clone(),
                done: done.clone(),
            };
            tasks.spawn(client.work(stop.subscribe()));
        }
        Self { tasks, stop, models, done }
    }

    /// Takes the names of the deployments that come and go.
    pub fn models(&self) -> watch::Sender<Vec<String>> {
        self.models.clone()
    }

    /// What became of the requests so far.
    pub fn done(&self) -> Arc<Mutex<Requests>> {
        self.done.clone()
    }

    /// Lets each finish its request.
    pub async fn stop(mut self) -> Requests {
        self.stop.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
        *self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Client {
    gateways: Vec<Gateway>,
    random: StdRng,
    /// `None`: the steady one.
    models: Option<watch::Receiver<Vec<String>>>,
    faults: Faults,
    done: Arc<Mutex<Requests>>,
}

impl Client {
    async fn work(mut self, stop: watch::Receiver<bool>) {
        while !*stop.borrow() {
            let model = match &self.models {
                None => Some(STEADY.to_owned()),
                Some(models) => models.borrow().choose(&mut self.random).cloned(),
            };
            if let Some(model) = model {
                self.ask(&model).await;
            }
            sleep(Duration::from_millis(self.random.random_range(0..PAUSE_MAX_MS))).await;
        }
    }

    async fn ask(&mut self, model: &str) {
        let stream = self.random.random_bool(0.6);
        let leaves = stream && self.random.random_bool(0.1);
        let request = json!({
            "model": model, "stream": stream, "max_tokens": self.random.random_range(8..200), "temperature": 0,
            "messages": [{ "role": "user", "content": format!("Number {}.", self.random.random_range(0..1_000_000)) }],
        });
        let gateway = &self.gateways[self.random.random_range(0..self.gateways.len())];
        let asked = ask(gateway, &request, leaves, self.models.is_some());
        let end = match timeout(REQUEST_DEADLINE, asked).await {
            Ok(end) => end,
            Err(_) => Err(anyhow::anyhow!("no end within {} s", REQUEST_DEADLINE.as_secs())),
        };
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        match end {
            Ok(End::Whole) if self.models.is_none() => done.steady += 1,
            Ok(End::Whole) => done.others += 1,
            Ok(End::Left) => done.left += 1,
            Ok(End::Refused) => done.refused += 1,
            Err(error) => {
                done.failed += 1;
                drop(done);
                self.faults.add(format!("a request to {model} (stream: {stream}): {error:#}"));
            }
        }
    }
}

/// One request. `may_fail`: it may be refused or break, as long as that is said.
async fn ask(gateway: &Gateway, request: &Value, leaves: bool, may_fail: bool) -> anyhow::Result<End> {
    let stream = request["stream"] == json!(true);
    let answer = gateway.post_raw("/v1/chat/completions", &[], Bytes::from(request.to_string())).await?;
    let status = answer.status().as_u16();
    let mut body = answer.into_body();
    if status != 200 {
        let text = body.collect().await.context("reading a refusal")?.to_bytes();
        ensure!(may_fail && REFUSALS.contains(&status), "answered {status}: {}", String::from_utf8_lossy(&text));
        return Ok(End::Refused);
    }
    let mut text = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = match frame {
            Ok(frame) => frame,
            // Of a plain answer a cut connection is the only way to say that it broke.
            Err(_) if may_fail && !stream => return Ok(End::Refused),
            Err(error) => return Err(anyhow::Error::new(error).context("the answer was cut")),
        };
        text.extend(frame.into_data().unwrap_or_default());
        if leaves {
            return Ok(End::Left);
        }
    }
    let text = String::from_utf8_lossy(&text);
    if !stream {
        let answer: Value = serde_json::from_str(&text).with_context(|| format!("the answer is {text}"))?;
        ensure!(answer["choices"][0]["message"]["content"].is_string(), "the answer has no content: {answer}");
        return Ok(End::Whole);
    }
    let mut events = text.lines().filter_map(|line| line.strip_prefix("data: "));
    if events.clone().any(|event| event == "[DONE]") {
        return Ok(End::Whole);
    }
    match events.find(|event| event.contains("\"error\"")) {
        Some(_) if may_fail => Ok(End::Refused),
        Some(error) => bail!("the stream broke: {error}"),
        None => bail!("the stream ended without [DONE] and without an error, after {} bytes", text.len()),
    }
}
