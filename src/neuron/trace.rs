//! Device times from a system trace: what `nrt_sys_trace_fetch_events` and the profilers built on it hand out as JSON.
//!
//! Capturing is not bound (`docs/neuron.md`): the runtime does it by environment, or by whoever else drives it. This reads the result.
#![forbid(unsafe_code)]

use super::error::{NeuronError, Result};
use serde_json::Value;
use std::collections::BTreeMap;

/// The event that a core sends when an execution begins and when it ends.
const RUNNING: &str = "nc_exec_running";

/// One execution on a core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Execution {
    /// The runtime's number for it.
    pub tracking_id: u64,
    /// When it began, in nanoseconds of the core's clock.
    pub start_ns: u64,
    /// When it ended; not before `start_ns`.
    pub stop_ns: u64,
}

impl Execution {
    /// How long it ran, in nanoseconds.
    pub fn nanoseconds(&self) -> u64 {
        self.stop_ns - self.start_ns
    }
}

/// The executions of a trace, `{"events": [{"event_type", "phase", "tracking_id", "data": {"nc_timestamp_ns"}}]}`, by the order in which
/// they ended. Events of other types are skipped, as are starts without an end (fetching drains the events: the end may come with the
/// next fetch) and ends without a start. No text is no event.
///
/// # Errors
/// [`NeuronError::Answer`] for text that is not such JSON (cut short, say), for an event of an execution without phase, number or time,
/// and for one that ends before it begins.
pub fn executions(json: &str) -> Result<Vec<Execution>> {
    let wrong = |problem: String| NeuronError::Answer { op: "nrt_sys_trace_fetch_events", problem };
    if json.trim().is_empty() {
        return Ok(Vec::new());
    }
    let trace: Value = serde_json::from_str(json).map_err(|e| wrong(e.to_string()))?;
    let events = trace.get("events").and_then(Value::as_array);
    let events = events.ok_or_else(|| wrong("there is no list of events".into()))?;
    let (mut begun, mut done) = (BTreeMap::new(), Vec::new());
    for (at, event) in events.iter().enumerate() {
        if event.get("event_type").and_then(Value::as_str) != Some(RUNNING) {
            continue;
        }
        let lacks = |part: &str| wrong(format!("event {at} has no {part}"));
        let id = event.get("tracking_id").and_then(Value::as_u64).ok_or_else(|| lacks("tracking_id"))?;
        let time = event.pointer("/data/nc_timestamp_ns").and_then(Value::as_u64);
        let time = time.ok_or_else(|| lacks("data.nc_timestamp_ns"))?;
        match event.get("phase").and_then(Value::as_str) {
            Some("start") => {
                begun.insert(id, time);
            }
            Some("stop") => {
                let Some(start_ns) = begun.remove(&id) else { continue };
                if time < start_ns {
                    return Err(wrong(format!("execution {id} ends at {time} ns, before it begins at {start_ns} ns")));
                }
                done.push(Execution { tracking_id: id, start_ns, stop_ns: time });
            }
            _ => return Err(lacks("phase start or stop")),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: &str, phase: &str, id: u64, ns: u64) -> String {
        format!(r#"{{"event_type":"{kind}","phase":"{phase}","tracking_id":{id},"data":{{"nc_timestamp_ns":{ns}}}}}"#)
    }

    fn trace(events: &[String]) -> String {
        format!(r#"{{"events":[{}],"version":2}}"#, events.join(","))
    }

    #[test]
    fn case_49_starts_and_stops_are_paired() {
        let json = trace(&[
            event(RUNNING, "start", 7, 100),
            event("nc_model_switch", "start", 7, 1),
            event(RUNNING, "start", 8, 150),
            r#"{"event_type":"something new"}"#.into(),
            event(RUNNING, "stop", 8, 180),
            event(RUNNING, "stop", 7, 190),
            event(RUNNING, "stop", 3, 5),
            event(RUNNING, "start", 9, 200),
        ]);
        let of = |tracking_id, start_ns, stop_ns| Execution { tracking_id, start_ns, stop_ns };
        let found = executions(&json).unwrap();
        assert_eq!(found, [of(8, 150, 180), of(7, 100, 190)]);
        assert_eq!(found[1].nanoseconds(), 90);
        // A number that comes again is another execution.
        let again = [event(RUNNING, "start", 1, 2), event(RUNNING, "stop", 1, 3)];
        assert_eq!(executions(&trace(&[again.clone(), again].concat())).unwrap().len(), 2);
    }

    #[test]
    fn case_49_what_is_no_trace_is_refused() {
        assert_eq!(executions(""), Ok(vec![]));
        assert_eq!(executions(" \n"), Ok(vec![]));
        assert_eq!(executions(r#"{"events":[]}"#), Ok(vec![]));
        let whole = trace(&[event(RUNNING, "start", 7, 100), event(RUNNING, "stop", 7, 190)]);
        for cut in 1..whole.len() {
            assert!(executions(&whole[..cut]).is_err(), "{}", &whole[..cut]);
        }
        for (events, said) in [
            (r#"{"event_type":"nc_exec_running","phase":"start","data":{"nc_timestamp_ns":1}}"#.into(), "tracking_id"),
            (r#"{"event_type":"nc_exec_running","phase":"start","tracking_id":1}"#.into(), "nc_timestamp_ns"),
            (event(RUNNING, "pause", 1, 1), "phase"),
            ([event(RUNNING, "start", 1, 9), event(RUNNING, "stop", 1, 8)].join(","), "before it begins"),
        ] {
            let refusal = executions(&trace(&[events])).unwrap_err().to_string();
            assert!(refusal.contains(said), "{refusal}");
        }
        assert!(executions("[]").is_err() && executions(r#"{"events":3}"#).is_err());
    }
}
