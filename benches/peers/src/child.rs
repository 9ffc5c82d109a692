//! Peers that live in a process of their own, a Python script of this folder: told to make one call, it answers with its seconds.

use crate::peer::Peer;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// After a call the threads of OpenMP go on spinning for some milliseconds: they would take the cores from whoever comes next.
const SETTLE: Duration = Duration::from_millis(20);

/// A script that waits for its next call.
pub(crate) struct ChildPeer {
    name: String,
    bytes: usize,
    child: Child,
    calls: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl ChildPeer {
    /// Starts `script` of this folder; it says its name and how many bytes of weights a call reads.
    pub(crate) fn start(
        python: &Path,
        script: &str,
        numbers: [usize; 4],
        format: Option<&str>,
    ) -> Result<Self, String> {
        let failed = |what: &dyn std::fmt::Display| format!("{} {script}: {what}", python.display());
        let mut child = Command::new(python)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(script))
            .args(numbers.map(|number| number.to_string()))
            .args(format)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| failed(&e))?;
        let (calls, answers) = child.stdin.take().zip(child.stdout.take()).ok_or_else(|| failed(&"no pipes"))?;
        let mut peer = ChildPeer { name: script.into(), bytes: 0, child, calls, answers: BufReader::new(answers) };
        let hello = peer.answer()?;
        let (bytes, name) = hello.split_once(' ').ok_or_else(|| failed(&"did not say who it is"))?;
        peer.bytes = bytes.parse().map_err(|e| failed(&e))?;
        peer.name = name.into();
        std::thread::sleep(SETTLE);
        Ok(peer)
    }

    fn answer(&mut self) -> Result<String, String> {
        let mut line = String::new();
        let read = self.answers.read_line(&mut line).map_err(|e| format!("{}: {e}", self.name))?;
        if read == 0 { Err(format!("{} has ended, see above", self.name)) } else { Ok(line.trim().into()) }
    }
}

impl Peer for ChildPeer {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn call(&mut self) -> Result<f64, String> {
        writeln!(self.calls, "call").and_then(|()| self.calls.flush()).map_err(|e| format!("{}: {e}", self.name))?;
        let seconds = self.answer()?.parse().map_err(|e| format!("{}: {e}", self.name))?;
        std::thread::sleep(SETTLE);
        Ok(seconds)
    }

    /// Its data are its own: it checks itself.
    fn first_row(&self) -> Option<Result<Vec<f32>, String>> {
        None
    }
}

impl Drop for ChildPeer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
