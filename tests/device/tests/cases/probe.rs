//! Finding the library, and saying why it cannot be used: cases 4 to 13, 47, 52.
#![forbid(unsafe_code)]

use device_tests::programs::Checked;
use device_tests::{Emulated, Session, child, flag};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use trn_kernels::neuron::{
    LIBRARY_VARIABLE, Library, LoadOptions, NeuronError, OPTIONAL_SYMBOLS, Origin, ProbeOptions, ProbeReport,
    REQUIRED_SYMBOLS, Read, Runtime, RuntimeOptions, SWITCH_VARIABLE, Status, Verdict, Version, Write, probe,
};

/// Where the package puts the library: machines that have it cannot show what happens without.
const PACKAGED: &str = "/opt/aws/neuron/lib/libnrt.so.1";

/// Probes the library at `path`, device nodes or not.
fn look(path: impl Into<PathBuf>) -> ProbeReport {
    probe(&ProbeOptions {
        library: LoadOptions { path: Some(path.into()), environment: false },
        require_device_nodes: false,
        ..ProbeOptions::default()
    })
}

fn skip_where_packaged() -> bool {
    let packaged = Path::new(PACKAGED).exists();
    if packaged {
        eprintln!("skipped: this machine has {PACKAGED}, so the places after it are not looked at");
    }
    packaged
}

#[test]
fn case_04_no_library_anywhere() {
    if child::role().is_none() {
        child::run(&mut child::command("probe::case_04_no_library_anywhere", "search"));
        return;
    }
    if skip_where_packaged() {
        return;
    }
    let report = probe(&ProbeOptions { require_device_nodes: false, ..ProbeOptions::default() });
    let Verdict::LibraryNotFound { tried } = &report.verdict else { panic!("{report}") };
    assert_eq!(tried.len(), 4, "{tried:?}");
    for (place, word) in tried.iter().zip([LIBRARY_VARIABLE, "in this process", PACKAGED, "loader's path"]) {
        assert!(place.contains(word), "{place} does not say {word}");
    }
    assert!(report.verdict.remedy().contains("aws-neuronx-runtime-lib"));
    assert_eq!(report.library, None);
}

#[test]
fn case_05_a_text_file_called_libnrt() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("libnrt.so.1");
    std::fs::write(&path, "this is no library\n").unwrap();
    let report = look(&path);
    let Verdict::LibraryUnloadable { path: named, dlerror } = &report.verdict else { panic!("{report}") };
    assert_eq!(named, &path.display().to_string());
    assert!(dlerror.contains("file too short") || dlerror.contains("invalid ELF header"), "{dlerror}");
    assert!(report.verdict.to_string().contains(dlerror.as_str()), "the linker's words are in the sentence");
}

#[test]
fn case_06_every_missing_symbol_is_named() {
    let emulated = Emulated::without(&["nrt_execute", "nrt_tensor_memset", "nrt_close", "nrt_get_instance_info"]);
    let report = look(emulated.path());
    let Verdict::MissingSymbols { path, names } = &report.verdict else { panic!("{report}") };
    assert_eq!(path, &emulated.path().display().to_string());
    // In the order of the list, required ones only.
    assert_eq!(names, &["nrt_close", "nrt_execute", "nrt_tensor_memset"]);
    assert_eq!(emulated.log(), [], "nothing of it was called");
    for symbol in REQUIRED_SYMBOLS {
        let report = look(Emulated::without(&[symbol]).path());
        assert!(matches!(&report.verdict, Verdict::MissingSymbols { names, .. } if names == &[*symbol]), "{report}");
    }
}

#[test]
fn case_07_the_core_of_2022_is_enough() {
    let (_, optional) = Emulated::new().symbols();
    assert!(OPTIONAL_SYMBOLS.iter().all(|s| optional.iter().any(|o| o == s)));
    let session = Session::on(Emulated::without(&optional.iter().map(String::as_str).collect::<Vec<_>>()));
    let runtime = &session.runtime;
    assert_eq!((runtime.instance(), runtime.memory(0)), (Ok(None), Ok(None)));
    let mut bound = session.bind(&Checked::open("matmul_fp8.tensor_exact"), 1);
    assert_eq!(bound.model.instances(), Ok(None));
    bound.assert_runs();
    // Several transfers at once become several calls.
    let (a, b) = (runtime.allocate(0, 8, "a").unwrap(), runtime.allocate(0, 8, "b").unwrap());
    let writes = [Write { tensor: &a, offset: 1, bytes: &[1, 2] }, Write { tensor: &b, offset: 0, bytes: &[3; 8] }];
    runtime.write_batch(&writes).unwrap();
    let (mut x, mut y) = ([0; 2], [0; 8]);
    let mut reads = [Read { tensor: &a, offset: 1, into: &mut x }, Read { tensor: &b, offset: 0, into: &mut y }];
    runtime.read_batch(&mut reads).unwrap();
    assert_eq!((x, y), ([1, 2], [3; 8]));
    drop((bound, a, b));
    session.end();
}

#[test]
fn case_08_no_device_nodes() {
    let (folder, emulated) = (tempfile::tempdir().unwrap(), Emulated::new());
    let library = LoadOptions { path: Some(emulated.path()), environment: false };
    let options = ProbeOptions { library, dev_root: folder.path().into(), ..ProbeOptions::default() };
    let report = probe(&options);
    assert_eq!(report.verdict, Verdict::NoDeviceNodes { dev_root: folder.path().into() });
    assert_eq!(emulated.log(), [], "without nodes the library is not even asked");
}

/// Root may open everything, so that as root a child gives root up; where it cannot, that is reported.
#[test]
fn case_08_a_device_node_without_permission() {
    const NAME: &str = "probe::case_08_a_device_node_without_permission";
    if let Some(folder) = child::role() {
        let options = ProbeOptions {
            library: LoadOptions { path: None, environment: false },
            dev_root: folder.clone().into(),
            ..ProbeOptions::default()
        };
        let report = probe(&options);
        assert_eq!(report.verdict, Verdict::DevicePermission { path: Path::new(&folder).join("neuron0") });
        assert!(report.verdict.remedy().contains("group"), "{report}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let node = folder.path().join("neuron0");
    std::fs::write(&node, "").unwrap();
    let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(&node, 0o000);
    mode(folder.path(), 0o755);
    let role = folder.path().to_str().unwrap();
    let is_root = std::fs::read_to_string("/proc/self/status").unwrap().contains("\nUid:\t0\t0\t");
    if !is_root {
        child::run(&mut child::command(NAME, role));
        return;
    }
    let nobody = 65534;
    match child::command(NAME, role).uid(nobody).gid(nobody).output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
        Err(e) => eprintln!("skipped: run by root, who may open every node, and root cannot be given up here: {e}"),
    }
}

#[test]
fn case_09_probing_takes_nothing() {
    let emulated = Emulated::new();
    let report = look(emulated.path());
    assert_eq!(report.verdict, Verdict::Ready { total: 2, visible: 2, version: Version::new(2, 34, 10) });
    let called: Vec<String> = emulated.log().into_iter().map(|(name, _)| name).collect();
    assert_eq!(called, ["nrt_get_version", "nrt_get_total_nc_count", "nrt_get_visible_nc_count"]);
    emulated.assert_clean();
}

#[test]
fn case_10_cores_that_cannot_be_counted_or_are_none() {
    let emulated = Emulated::new();
    for op in ["nrt_get_version", "nrt_get_total_nc_count", "nrt_get_visible_nc_count"] {
        emulated.inject(op, 1, 0, 1);
        let verdict = look(emulated.path()).verdict;
        assert_eq!(verdict, Verdict::CountFailed { op, status: Status::FAILURE });
        assert!(verdict.remedy().contains("NEURON_RT_LOG_LEVEL=INFO"));
    }
    emulated.set_cores(32, 0);
    assert_eq!(look(emulated.path()).verdict, Verdict::NoVisibleCores { total: 32 });
    emulated.assert_clean();
}

#[test]
fn case_11_old_versions_and_unterminated_texts() {
    let emulated = Emulated::new();
    emulated.set_version([2, 29, 40, 0]);
    let report = look(emulated.path());
    assert!(report.verdict.is_ready(), "{report}");
    assert!(report.warnings.iter().any(|w| w.contains("2.29.40") && w.contains("4 GiB")), "{report}");
    let old = probe(&ProbeOptions {
        library: LoadOptions { path: Some(emulated.path()), environment: false },
        require_device_nodes: false,
        min_version: Some(Version::new(2, 30, 50)),
        ..ProbeOptions::default()
    });
    let (found, min) = (Version::new(2, 29, 40), Version::new(2, 30, 50));
    assert_eq!(old.verdict, Verdict::RuntimeTooOld { found, min });
    emulated.set_flags(flag::VERSION_UNTERMINATED);
    let (_, detail) = emulated.open().version().unwrap();
    assert!((1..=128 * 3).contains(&detail.len()), "{} bytes of a field of 128", detail.len());
}

#[test]
fn case_12_a_named_file_is_the_only_one() {
    const NAME: &str = "probe::case_12_a_named_file_is_the_only_one";
    if let Some(missing) = child::role() {
        let open = || Library::open(&LoadOptions::path(&missing));
        assert_eq!(open(), Err(NeuronError::LibraryNotFound { tried: vec![missing.clone()] }));
        // And so for one that is there and does not load.
        std::fs::write(&missing, "text").unwrap();
        assert!(matches!(open(), Err(NeuronError::LibraryUnloadable { .. })));
        // The variable names a file that would have done.
        assert_eq!(Library::open(&LoadOptions::default()).unwrap().origin(), Origin::Environment);
        return;
    }
    let (emulated, folder) = (Emulated::new(), tempfile::tempdir().unwrap());
    let missing = folder.path().join("libnrt.so.1");
    child::run(child::command(NAME, missing.to_str().unwrap()).env(LIBRARY_VARIABLE, emulated.path()));
}

#[test]
fn case_12_the_search_order() {
    const NAME: &str = "probe::case_12_the_search_order";
    let open = |environment| Library::open(&LoadOptions { path: None, environment });
    match child::role().as_deref() {
        Some("environment") => {
            let library = open(true).unwrap();
            assert_eq!(
                (library.origin(), library.path().into()),
                (Origin::Environment, std::env::var_os("WANTED").unwrap())
            );
        }
        Some("loader") if skip_where_packaged() => {}
        Some("loader") => assert_eq!(open(true).unwrap().origin(), Origin::LoaderPath),
        Some("mapped") => {
            // A framework's copy, in the process before we are asked.
            let framework = Emulated::new();
            let library = open(false).unwrap();
            assert_eq!(library.origin(), Origin::Mapped);
            assert_eq!(library, framework.open(), "it is that very copy");
            library.version().unwrap();
            assert_eq!(framework.calls("nrt_get_version"), 1);
        }
        Some(other) => panic!("{other}"),
        None => {
            let (named, on_path) = (Emulated::new(), Emulated::new());
            let child = |role| child::command(NAME, role);
            let both = |role| {
                let mut command = child(role);
                command.env(LIBRARY_VARIABLE, named.path()).env("LD_LIBRARY_PATH", on_path.folder());
                command
            };
            child::run(both("environment").env("WANTED", named.path()));
            child::run(child("loader").env("LD_LIBRARY_PATH", on_path.folder()));
            // A mapped copy comes before the loader's path, and options can refuse the environment.
            child::run(&mut both("mapped"));
        }
    }
}

#[test]
fn case_13_the_kill_switch() {
    const NAME: &str = "probe::case_13_the_kill_switch";
    let Some(path) = child::role() else {
        let emulated = Emulated::new();
        let mut command = child::command(NAME, emulated.path().to_str().unwrap());
        child::run(command.env(SWITCH_VARIABLE, "0").env(LIBRARY_VARIABLE, emulated.path()));
        return;
    };
    let named = LoadOptions::path(&path);
    for library in [LoadOptions::default(), named.clone()] {
        assert_eq!(Library::open(&library), Err(NeuronError::Disabled));
        let report = probe(&ProbeOptions { library, require_device_nodes: false, ..ProbeOptions::default() });
        assert_eq!(report.verdict, Verdict::DisabledByEnv);
        assert!(report.environment.iter().any(|(v, value)| v.name == SWITCH_VARIABLE && value == "0"), "{report}");
    }
    let deaf = LoadOptions { environment: false, ..named };
    assert!(Library::open(&deaf).is_ok(), "who does not listen to the environment is not switched off by it");
}

#[test]
fn case_47_one_file_is_one_library() {
    let (emulated, other) = (Emulated::new(), Emulated::new());
    let folder = tempfile::tempdir_in(emulated.folder()).unwrap();
    let (hard, soft) = (folder.path().join("libnrt.so.1"), folder.path().join("soft.so"));
    std::fs::hard_link(emulated.path(), &hard).unwrap();
    std::os::unix::fs::symlink(emulated.path(), &soft).unwrap();
    let library = emulated.open();
    for path in [hard, soft] {
        let again = Library::open(&LoadOptions { path: Some(path), environment: false }).unwrap();
        assert_eq!((again, again.path()), (library, library.path()));
    }
    assert_ne!(library, other.open(), "a copy is another library");
    // One runtime to one library, and to a process unless it says otherwise.
    let session = Session::on(emulated);
    assert!(matches!(Runtime::init(&library, &device_tests::BESIDE), Err(NeuronError::AlreadyInitialized)));
    let refused = Runtime::init(&other.open(), &RuntimeOptions::default()).unwrap_err();
    assert!(matches!(refused, NeuronError::AnotherLibrary { .. }), "{refused}");
    assert_eq!(other.calls("nrt_init"), 0);
    session.end();
}

/// What can be asked of any runtime: counts, memory, a round trip.
fn smoke(runtime: Runtime) {
    assert!(runtime.cores() > 0);
    let tensor = runtime.allocate(0, 4096, "smoke").unwrap();
    let bytes: Vec<u8> = (0..4096u32).map(|i| ((i * 31) >> 3) as u8).collect();
    tensor.write(0, &bytes).unwrap();
    let mut back = vec![0; 4096];
    tensor.read(0, &mut back).unwrap();
    assert!(back == bytes, "what came back is not what was written");
    drop(tensor);
    runtime.close().unwrap();
}

/// In a child, since this process has emulated libraries mapped, which the search would find.
#[test]
fn case_52_smoke_test_of_the_real_library() {
    const NAME: &str = "probe::case_52_smoke_test_of_the_real_library";
    if child::role().is_some() {
        let report = probe(&ProbeOptions::default());
        if report.verdict.is_ready() {
            let library = Library::open(&LoadOptions::default()).unwrap();
            smoke(Runtime::init(&library, &RuntimeOptions::default()).unwrap());
            println!("the real library did it:\n{report}");
        } else {
            println!("skipped: no real libnrt to try: {}", report.verdict);
        }
        return;
    }
    let said = child::run(&mut child::command(NAME, "smoke"));
    assert!(said.contains("the real library did it") || said.contains("skipped: "), "{said}");
    eprintln!("{}", said.lines().find(|l| l.starts_with("skipped: ")).unwrap_or("the real library did it"));
    let session = Session::open();
    smoke(session.runtime);
    session.emulated.assert_clean();
}
