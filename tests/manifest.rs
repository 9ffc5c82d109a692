//! The kernels' manifest: it says of every call what the kernels' own assertions say (`kernels/tests/refusals.json`, which
//! `kernels/tests/test_manifest.py` sends through the kernels), and no manifest and no call is too strange for it.
#![forbid(unsafe_code)]

#[path = "support/programs.rs"]
mod programs;

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use trn_kernels::Error;
use trn_kernels::trainium::manifest::{Argument, Bound, KernelEntry, Manifest, ParameterKind};
use trn_kernels::trainium::{Dtype, Target};

fn bundled() -> &'static Manifest {
    Manifest::bundled().expect("the crate's own manifest")
}

/// A call as the table has it.
#[derive(Clone)]
struct Call<'a> {
    target: Target,
    inputs: BTreeMap<&'a str, (Dtype, Vec<usize>)>,
    parameters: BTreeMap<&'a str, &'a Value>,
}

impl<'a> Call<'a> {
    fn new(base: &'a Value) -> Call<'a> {
        let mut call = Call { target: Target::Trn1, inputs: BTreeMap::new(), parameters: BTreeMap::new() };
        call.set("target", &base["target"]);
        for part in ["inputs", "parameters"] {
            base[part].as_object().expect(part).iter().for_each(|(name, value)| call.set(name, value));
        }
        call
    }

    /// Sets the target, a tensor (`[dtype, extents]`) or a parameter; null takes it away.
    fn set(&mut self, name: &'a str, value: &'a Value) {
        match value {
            Value::String(target) if name == "target" => self.target = Target::by_name(target).expect("a target"),
            Value::Array(tensor) => {
                let dtype = Dtype::by_name(tensor[0].as_str().expect("a type")).expect("an NKI type");
                let shape = tensor[1].as_array().expect("extents").iter();
                self.inputs.insert(name, (dtype, shape.map(|e| e.as_u64().expect("an extent") as usize).collect()));
            }
            Value::Null => drop((self.inputs.remove(name), self.parameters.remove(name))),
            value => drop(self.parameters.insert(name, value)),
        }
    }

    fn check(&self, entry: &KernelEntry) -> Result<Bound, Error> {
        let inputs: Vec<_> = self.inputs.iter().map(|(name, (dtype, shape))| (*name, *dtype, shape)).collect();
        let parameters: Vec<_> = self.parameters.iter().map(|(name, value)| (*name, argument(value))).collect();
        entry.check(self.target, &inputs, &parameters)
    }
}

fn argument(value: &Value) -> Argument<'_> {
    match value {
        Value::Bool(b) => Argument::Bool(*b),
        Value::String(s) => Argument::Text(s),
        Value::Number(n) => n.as_i64().map_or_else(|| Argument::Real(n.as_f64().expect("a number")), Argument::Int),
        other => panic!("{other} is no argument"),
    }
}

fn table() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/tests/refusals.json");
    serde_json::from_slice(&std::fs::read(path).expect("the table")).expect("JSON")
}

#[test]
fn every_call_of_the_table_has_the_kernels_verdict() {
    let table = table();
    for entry in bundled().kernels() {
        let base = &table[entry.name()];
        let (mut served, mut named) = (0, BTreeSet::new());
        for case in base["cases"].as_array().expect("cases") {
            let mut call = Call::new(base);
            case["change"].as_object().expect("a change").iter().for_each(|(name, value)| call.set(name, value));
            match (call.check(entry), case["refused"].as_str()) {
                (Ok(bound), None) => {
                    assert_eq!(bound.inputs().len(), call.inputs.len(), "{case}");
                    served += 1;
                }
                (Err(Error::Constraint { kernel, constraint, needed, .. }), Some(refused)) => {
                    assert_eq!((kernel.as_str(), constraint.as_str()), (entry.name(), refused), "{case}");
                    let text = entry.constraints().iter().find(|c| c.name() == refused).map(|c| c.text());
                    assert_eq!(Some(needed.as_str()), text, "{case}");
                    named.insert(refused);
                }
                (verdict, _) => panic!("{}: {case} gave {verdict:?}", entry.name()),
            }
        }
        let all: BTreeSet<&str> = entry.constraints().iter().map(|c| c.name()).collect();
        assert_eq!(named, all, "{}: constraints with a refused case", entry.name());
        assert!(served > 5, "{}", entry.name());
    }
}

/// What a program was made for is served, and what it gives is as large as the manifest says.
#[test]
fn programs_are_calls_that_the_manifest_serves() {
    let mut seen = BTreeSet::new();
    for file in programs::all() {
        let Ok(entry) = bundled().kernel(file.program.kernel()) else { continue };
        let program = &file.program;
        let tensor = |port: &trn_kernels::trainium::emulator::Port| &program.tensors()[port.tensor];
        let inputs: Vec<(&str, Dtype, &[usize])> =
            program.inputs().iter().map(|p| (p.name.as_str(), tensor(p).dtype(), tensor(p).shape())).collect();
        let parameters: Vec<(&str, Argument<'_>)> = program
            .parameters()
            .iter()
            .map(|(name, text)| {
                (name.as_str(), entry.parameter(name).expect("a parameter").read(text).expect("its kind"))
            })
            .collect();
        let bound = entry.check(program.target(), &inputs, &parameters).expect("a call that is served");
        for (port, given) in program
            .inputs()
            .iter()
            .map(|p| (p, bound.inputs().iter().find(|t| t.name == p.name).expect("an input of the manifest")))
        {
            assert_eq!(given.bytes, tensor(port).bytes());
        }
        for output in bound.outputs() {
            let port = program.outputs().iter().find(|p| p.name == output.name).expect("an output of the manifest");
            assert_eq!((output.dtype, &output.shape[..]), (tensor(port).dtype(), tensor(port).shape()));
            assert_eq!(output.bytes, tensor(port).bytes());
        }
        seen.insert(entry.name());
    }
    assert_eq!(seen, bundled().kernels().iter().map(|k| k.name()).collect(), "kernels with a program");
}

#[test]
fn the_entries_say_what_registries_ask() {
    let kernel = bundled().kernel("matmul_mx").unwrap();
    assert_eq!((kernel.file(), kernel.entry(), kernel.layout()), ("matmul_mx.py", "matmul_mx", Some("mx-quads/1")));
    assert_eq!(kernel.targets(), [Target::Trn3]);
    assert_eq!((kernel.inputs()[0].name(), kernel.inputs()[0].shape()), ("x", "[X, K] | [128, TX, R]"));
    assert_eq!(kernel.inputs().iter().map(|i| i.optional()).collect::<Vec<_>>(), [false, false, false, true, true]);
    assert_eq!((kernel.outputs()[0].name(), kernel.outputs()[0].shape()), ("output_0", "[M, N]"));
    let element = kernel.parameter("w_element").unwrap();
    assert_eq!(element.kind(), &ParameterKind::OneOf(["e4m3fn", "e5m2", "e2m1"].map(String::from).to_vec()));
    assert_eq!((element.default_value(), element.optional()), (Some(Argument::Text("e2m1")), false));
    let m = kernel.parameter("m").unwrap();
    assert_eq!((m.read("128"), m.default_value(), m.optional()), (Ok(Argument::Int(128)), None, true));
    assert_eq!(m.read("all").unwrap_err().to_string(), "m = \"all\" is not supported: it is a whole number");
    let unknown = bundled().kernel("matmul").unwrap_err().to_string();
    assert!(unknown.starts_with("kernel \"matmul\" is not supported: the manifest has matmul_fp8, "), "{unknown}");
}

/// Bytes and dimensions of one call, by hand.
#[test]
fn a_bound_call_knows_its_sizes() {
    let entry = bundled().kernel("matmul_mx").unwrap();
    let inputs = [
        ("w_scale", Dtype::Uint8, vec![64, 2, 96]),
        ("x", Dtype::Bfloat16, vec![5, 2080]),
        ("w", Dtype::Uint16, vec![128, 5, 96]),
    ];
    let bound = entry.check(Target::Trn3, &inputs, &[("n", Argument::Int(70))]).unwrap();
    assert_eq!(
        ["M", "N", "K", "T", "C", "R"].map(|d| bound.dim(d)),
        [Some(5), Some(70), Some(2080), Some(5), Some(96), None]
    );
    let sizes: Vec<(&str, usize)> = bound.inputs().iter().map(|t| (t.name.as_str(), t.bytes)).collect();
    assert_eq!(sizes, [("x", 5 * 2080 * 2), ("w", 128 * 5 * 96 * 2), ("w_scale", 64 * 2 * 96)]);
    assert_eq!(bound.outputs()[0].shape, [5, 70]);
    assert_eq!((bound.outputs()[0].dtype, bound.outputs()[0].bytes), (Dtype::Bfloat16, 5 * 70 * 2));
    let refused = entry.check(Target::Trn2, &inputs, &[]).unwrap_err();
    assert_eq!(refused.to_string(), "target: got target = trn2, needed trn3 (matmul_mx)");
}

#[test]
fn arguments_are_refused_by_name() {
    let entry = bundled().kernel("rmsnorm_quantize_fp8").unwrap();
    let (x, gamma) = (("x", Dtype::Bfloat16, vec![4, 64]), ("gamma", Dtype::Bfloat16, vec![1, 64]));
    let text = |inputs: &[(&str, Dtype, Vec<usize>)], parameters: &[(&str, Argument<'_>)]| {
        entry.check(Target::Trn2, inputs, parameters).unwrap_err().to_string()
    };
    let both = [x.clone(), gamma.clone()];
    assert_eq!(text(&both[..1], &[]), "gamma: missing, needed by rmsnorm_quantize_fp8");
    let twice = [x.clone(), gamma.clone(), x.clone()];
    assert_eq!(text(&twice, &[]), "x: given but not wanted: it was given before");
    let more = [x.clone(), gamma.clone(), ("y", Dtype::Int8, vec![])];
    assert_eq!(text(&more, &[]), "y: given but not wanted: rmsnorm_quantize_fp8 has none of that name");
    let empty = [("x", Dtype::Bfloat16, vec![0, 64]), gamma];
    assert_eq!(
        text(&empty, &[]),
        "rmsnorm_quantize_fp8: x = bfloat16 [0, 64] is not supported: each axis needs at least 1"
    );
    assert_eq!(text(&both, &[("eps", Argument::Bool(true))]), "eps = Bool(true) is not supported: its kind is F32");
    assert_eq!(
        text(&both, &[("epsilon", Argument::Real(1e-5))]),
        "epsilon: given but not wanted: rmsnorm_quantize_fp8 has none of that name"
    );
    assert_eq!(
        text(&both, &[("eps", Argument::Real(f64::NAN))]),
        "eps: got eps = NaN, needed 2^-80 <= eps < 2^80 (rmsnorm_quantize_fp8)"
    );
    assert!(entry.check(Target::Trn2, &both, &[("eps", Argument::Int(1))]).is_ok(), "a whole number is a number");
    let huge = [("x", Dtype::Float32, vec![usize::MAX, 64]), x.clone()];
    assert_eq!(
        text(&[huge[0].clone(), ("gamma", Dtype::Float32, vec![1, 64])], &[]),
        "x: the product of its extents does not fit in usize or in memory"
    );
}

/// A manifest of one kernel, its lists replaced.
fn manifest(change: &[(&str, &str)]) -> String {
    let mut lists = BTreeMap::from([
        ("targets", r#"["trn2"]"#),
        ("inputs", r#"[{ name = "x", dtype = "bf16", shape = "[M, K]" }]"#),
        ("parameters", r#"[{ name = "n", kind = "int", optional = true }]"#),
        ("definitions", "[]"),
        ("outputs", r#"[{ name = "y", dtype = "f32", shape = "[M]" }]"#),
        ("constraints", "[]"),
    ]);
    lists.extend(change.iter().copied());
    let lists: String = lists.iter().map(|(name, value)| format!("{name} = {value}\n")).collect();
    format!("[[kernel]]\nname = \"k\"\nfile = \"k.py\"\nentry = \"k\"\n{lists}")
}

/// The verdict of one check over `x` `[M, K]` and `n`.
fn verdict(check: &str, shape: &[usize], n: Option<i64>) -> Result<Bound, Error> {
    let text = manifest(&[("constraints", &format!("[{{ name = \"c\", text = \"t\", check = \"{check}\" }}]"))]);
    let parsed = Manifest::parse(&text).unwrap_or_else(|e| panic!("{check}: {e}"));
    let n: Vec<(&str, Argument<'_>)> = n.map(|n| ("n", Argument::Int(n))).into_iter().collect();
    parsed.kernels()[0].check(Target::Trn2, &[("x", Dtype::Bfloat16, shape)], &n)
}

/// Precedence and arithmetic are Python's (`kernels/tests/test_manifest.py` has the same list).
#[test]
fn expressions_mean_what_they_mean_in_python() {
    let expressions: Value = {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/tests/expressions.json");
        serde_json::from_slice(&std::fs::read(path).expect("the expressions")).expect("JSON")
    };
    for case in expressions.as_array().expect("a list") {
        let (check, needed) = (case[0].as_str().expect("a text"), case[1].as_bool());
        match (verdict(check, &[6, 5], Some(-7)), needed) {
            (Ok(_), Some(true)) | (Err(Error::Constraint { .. }), Some(false)) => {}
            // No value: refused as well, with the reason.
            (Err(Error::Constraint { got, .. }), None) => {
                let reasons = ["too large", "division is by zero", "not whole", "too many steps", "is not known"];
                assert!(reasons.iter().any(|r| got.contains(r)), "{check}: {got}");
            }
            (other, _) => panic!("{check}: needed {needed:?}, got {other:?}"),
        }
    }
}

#[test]
fn a_constraint_that_has_no_value_refuses_and_says_why() {
    let text = |check, shape: &[usize], n| verdict(check, shape, n).unwrap_err().to_string();
    assert_eq!(text("n < M", &[2, 3], None), "c: got no n, M = 2, n is not known, needed t (k)");
    assert_eq!(text("M * K * M < 4", &[usize::MAX; 2], None), {
        let max = usize::MAX;
        format!("c: got M = {max}, K = {max}, a number is too large, needed t (k)")
    });
    assert_eq!(text("K < 4", &[2, 3, 4], None), "c: got no K, K is not known, needed t (k)");
    // Many searches inside one another end.
    let deep = "max(max(max(max(1 for d in range(0, 4096)) for c in range(0, 4096)) for b in range(0, 99)) for a in range(0, 99)) > 0";
    assert_eq!(text(deep, &[2, 3], None), "c: got it takes too many steps, needed t (k)");
}

#[test]
fn manifests_that_are_wrong_say_where() {
    let problem = |change: &[(&str, &str)]| match Manifest::parse(&manifest(change)) {
        Err(Error::Manifest { at, problem }) => format!("{at}: {problem}"),
        other => panic!("{change:?}: {other:?}"),
    };
    assert!(Manifest::parse(&manifest(&[])).is_ok(), "what the others break");
    for (part, value, needed) in [
        ("targets", r#"["trn9"]"#, "k: target \"trn9\": needed trn1, trn2 or trn3"),
        ("inputs", r#"[{ name = "x", dtype = "f8", shape = "[M]" }]"#, "k: input \"x\": libnrt has no type \"f8\""),
        (
            "inputs",
            r#"[{ name = "x", dtype = "dtype of x", shape = "[M]" }]"#,
            "k: input \"x\": no input before it is called \"x\"",
        ),
        ("inputs", r#"[{ name = "n", dtype = "f32", shape = "[M]" }]"#, "k: input \"n\": the name is taken"),
        (
            "inputs",
            r#"[{ name = "max", dtype = "f32", shape = "[M]" }]"#,
            "k: input \"max\": it is not a name, or a word of the language",
        ),
        ("inputs", r#"[{ name = "x", dtype = "f32", shape = "M" }]"#, "k: input \"x\": got M, needed ["),
        (
            "inputs",
            r#"[{ name = "x", dtype = "f32", shape = "[M, 1 if fits(x) else 2]" }]"#,
            "k: input \"x\": no tensor is called x",
        ),
        (
            "inputs",
            r#"[{ name = "x", dtype = "f32", shape = "[M, 2 * L]" }]"#,
            "k: input \"x\": nothing here is called L",
        ),
        (
            "parameters",
            r#"[{ name = "n", kind = "int", default = "1" }]"#,
            "k: default of parameter \"n\": the default is not of its kind",
        ),
        (
            "parameters",
            r#"[{ name = "n", kind = "int", default = 1, optional = true }]"#,
            "k: default of parameter \"n\": it is optional",
        ),
        (
            "definitions",
            r#"[{ name = "A", value = "B" }, { name = "B", value = "A" }]"#,
            "k: definition \"A\": nothing here is called B",
        ),
        ("definitions", r#"[{ name = "x", value = "1" }]"#, "k: definition \"x\": the name is taken"),
        (
            "outputs",
            r#"[{ name = "y", dtype = "f32 | bf16", shape = "[M]" }]"#,
            "k: output \"y\": which of these types it has does not follow from a call",
        ),
        (
            "outputs",
            r#"[{ name = "y", dtype = "fp8_e4", shape = "[M]" }]"#,
            "k: output \"y\": fp8_e4 is more than one type",
        ),
        (
            "outputs",
            r#"[{ name = "y", dtype = "value of n", shape = "[M]" }]"#,
            "k: output \"y\": n does not name a type",
        ),
        (
            "outputs",
            r#"[{ name = "y", dtype = "f32", shape = "[M] | [K]" }]"#,
            "k: output \"y\": alternatives in the shape of an output",
        ),
        (
            "constraints",
            r#"[{ name = "c", text = "t", check = "M" }]"#,
            "k: constraint \"c\": a number where true or false is needed",
        ),
        (
            "constraints",
            r#"[{ name = "c", text = "t", check = "target < 'trn3'" }]"#,
            "k: constraint \"c\": an order of a text",
        ),
        (
            "constraints",
            r#"[{ name = "c", text = "t", check = "M == 'a'" }]"#,
            "k: constraint \"c\": a text where a number is needed",
        ),
        (
            "constraints",
            r#"[{ name = "c", text = "t", check = "rank(n) == 1" }]"#,
            "k: constraint \"c\": no tensor is called n",
        ),
        (
            "constraints",
            r#"[{ name = "c", text = "t", check = "max(M for M in range(0, 2)) > 1" }]"#,
            "k: constraint \"c\": M already has a meaning",
        ),
    ] {
        assert_eq!(problem(&[(part, value)]), needed);
    }
    let twice = manifest(&[]).repeat(2);
    assert!(Manifest::parse(&twice).unwrap_err().to_string().contains("two kernels are called \"k\""));
    assert!(Manifest::parse("kernel = 1").unwrap_err().to_string().starts_with("manifest: "));
    assert!(Manifest::parse(&" ".repeat(2 << 20)).unwrap_err().to_string().contains("the limit is 1048576"));
    let many = format!("[{}]", r#"{ name = "y", dtype = "f32", shape = "[M]" },"#.repeat(129));
    assert_eq!(problem(&[("outputs", &many)]), "k: a list of 129, the limit is 128");
    let arrays = format!("a = {}", "[".repeat(100_000));
    assert!(Manifest::parse(&arrays).is_err());
}
