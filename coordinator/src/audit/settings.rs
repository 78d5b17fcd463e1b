//! Which trace backend there is: the standard variables `OTEL_EXPORTER_OTLP_*`.

use std::{fmt, time::Duration};
use tonic::metadata::{Ascii, MetadataKey, MetadataValue};

/// Metadata of every call to the backend.
pub type Headers = Vec<(MetadataKey<Ascii>, MetadataValue<Ascii>)>;

/// How spans are handed to the trace backend.
#[derive(Clone)]
pub struct Settings {
    /// The backend's OTLP/gRPC endpoint, for example `http://jaeger:4317`; none: spans are only received and counted.
    pub endpoint: Option<http::Uri>,
    /// Metadata of every call, for example an API key. Never printed.
    pub headers: Headers,
    /// Longest wait for the backend's answer.
    pub timeout: Duration,
    /// Compress what is sent.
    pub gzip: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { endpoint: None, headers: Vec::new(), timeout: Duration::from_secs(10), gzip: false }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.headers.iter().map(|(key, _)| key.as_str()).collect();
        f.debug_struct("Settings")
            .field("endpoint", &self.endpoint)
            .field("headers", &names)
            .field("timeout", &self.timeout)
            .field("gzip", &self.gzip)
            .finish()
    }
}

/// A variable that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{variable}: {what}")]
pub struct Invalid {
    /// Its name.
    pub variable: &'static str,
    /// What is wrong and the way out. Holds no values of headers.
    pub what: String,
}

impl Settings {
    /// Reads `OTEL_EXPORTER_OTLP_ENDPOINT`, `_HEADERS`, `_TIMEOUT`, `_COMPRESSION` and `_PROTOCOL`; each one's
    /// `OTEL_EXPORTER_OTLP_TRACES_…` twin wins.
    pub fn from_env() -> Result<Self, Invalid> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(get: impl Fn(&str) -> Option<String>) -> Result<Self, Invalid> {
        let either = |traces: &'static str, general: &'static str| {
            [traces, general].into_iter().find_map(|name| {
                let value = get(name).filter(|value| !value.trim().is_empty())?;
                Some((name, value.trim().to_owned()))
            })
        };
        let mut settings = Self::default();
        let Some((name, text)) = either("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT") else {
            return Ok(settings);
        };
        settings.endpoint = Some(endpoint(name, &text)?);
        if let Some((name, text)) = either("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
            && text != "grpc"
        {
            return Err(wrong(name, format!("\"{text}\" is not supported: set it to \"grpc\", or leave it out")));
        }
        if let Some((name, text)) = either("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS") {
            settings.headers = headers(name, &text)?;
        }
        if let Some((name, text)) = either("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT") {
            let millis = text.parse().ok().filter(|n| (1..=600_000).contains(n));
            let what = || format!("\"{text}\" is no whole number of milliseconds from 1 to 600000");
            settings.timeout = Duration::from_millis(millis.ok_or_else(|| wrong(name, what()))?);
        }
        if let Some((name, text)) = either("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "OTEL_EXPORTER_OTLP_COMPRESSION") {
            settings.gzip = match text.as_str() {
                "gzip" => true,
                "none" => false,
                _ => return Err(wrong(name, format!("\"{text}\" is not known: set it to gzip or none"))),
            };
        }
        Ok(settings)
    }
}

fn wrong(variable: &'static str, what: impl Into<String>) -> Invalid {
    Invalid { variable, what: what.into() }
}

fn endpoint(name: &'static str, text: &str) -> Result<http::Uri, Invalid> {
    let example = "expected the address of an OTLP/gRPC receiver, for example http://127.0.0.1:4317";
    let uri: http::Uri =
        text.parse().map_err(|error| wrong(name, format!("\"{text}\" is no URL ({error}): {example}")))?;
    match uri.scheme_str() {
        Some("http") if uri.host().is_some_and(|host| !host.is_empty()) => Ok(uri),
        Some("https") => Err(wrong(
            name,
            format!("\"{text}\": TLS to the trace backend is not supported yet; use a collector beside it"),
        )),
        _ => Err(wrong(name, format!("\"{text}\": {example}"))),
    }
}

/// Reads `key=value,key=value`, with values percent-encoded as in W3C baggage.
fn headers(name: &'static str, text: &str) -> Result<Headers, Invalid> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    pairs
        .enumerate()
        .map(|(i, pair)| {
            // The value may be a secret: the error says where it is, not what.
            let bad = |what: &str| wrong(name, format!("header number {} {what}: expected key=value,key=value", i + 1));
            let (key, value) = pair.split_once('=').ok_or_else(|| bad("has no '='"))?;
            let key = key.trim().to_ascii_lowercase().parse().map_err(|_| bad("has a name that is not allowed"))?;
            let value = decode(value.trim()).ok_or_else(|| bad("has a value that is not percent-encoded well"))?;
            let mut value: MetadataValue<Ascii> =
                MetadataValue::try_from(value).map_err(|_| bad("has a value that is not allowed"))?;
            value.set_sensitive(true);
            Ok((key, value))
        })
        .collect()
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
                u8::try_from(digit(bytes.next())? * 16 + digit(bytes.next())?).ok()?
            }
            other => other,
        });
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Settings, Invalid> {
        Settings::from_variables(|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn the_standard_variables_are_read_and_those_for_traces_win() {
        assert_eq!(read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "")]).unwrap().endpoint, None);
        let settings = read(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://general:4317"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://traces:4317"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=s%20ecret%2C1, Other = b"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "1500"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
        ])
        .unwrap();
        assert_eq!(settings.endpoint.as_ref().unwrap().host(), Some("traces"));
        let headers: Vec<_> = settings.headers.iter().map(|(k, v)| (k.as_str(), v.to_str().unwrap())).collect();
        assert_eq!(headers, [("api-key", "s ecret,1"), ("other", "b")]);
        assert_eq!((settings.timeout, settings.gzip), (Duration::from_millis(1500), true));
        assert!(!format!("{settings:?}").contains("ecret"));
    }

    #[test]
    fn wrong_values_are_named_with_the_way_out_and_secrets_are_not() {
        let with = |name, value| read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a:4317"), (name, value)]).unwrap_err();
        let error = with("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf").to_string();
        assert!(
            error.contains("OTEL_EXPORTER_OTLP_PROTOCOL: \"http/protobuf\"") && error.contains("\"grpc\""),
            "{error}"
        );
        let error = with("OTEL_EXPORTER_OTLP_HEADERS", "a=b,secret").to_string();
        assert!(error.contains("header number 2") && !error.contains("secret"), "{error}");
        assert!(with("OTEL_EXPORTER_OTLP_TIMEOUT", "soon").to_string().contains("\"soon\""));
        for endpoint in ["jaeger:4317", "https://a:4317", "ftp://a", "http://"] {
            let error = read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)]).unwrap_err().to_string();
            assert!(error.contains(endpoint), "{error}");
        }
    }
}
