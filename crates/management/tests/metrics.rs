//! The numbers of a machine, read as Prometheus reads them; and that what is drawn of them exists.
#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
mod fake;
#[path = "fake/host.rs"]
#[allow(dead_code)]
mod fake_host;
#[path = "fake/share.rs"]
mod fake_share;
mod some_pool;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use api::{DiskConfig, Host, NetBackend, NetConfig, Share, Vm};
use fake::FakeVm;
use fake_host::FakeHost;
use fake_share::FakeShare;
use management::Server;

/// A sample: its labels and its value.
type Sample = (BTreeMap<String, String>, f64);

#[derive(Debug)]
struct Family {
    kind: String,
    /// By the whole name.
    samples: BTreeMap<String, Vec<Sample>>,
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with(|letter: char| letter.is_ascii_digit())
        && text
            .chars()
            .all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
}

/// Name, labels, value of a line.
fn sample(line: &str) -> (String, Sample) {
    let at = line.find(['{', ' ']).unwrap();
    let (name, mut rest) = line.split_at(at);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (label, after) = rest.split_once("=\"").unwrap();
            assert!(is_name(label), "{line}");
            let mut value = String::new();
            let mut letters = after.char_indices();
            let end = loop {
                match letters.next().unwrap() {
                    (at, '"') => break at,
                    (_, '\\') => match letters.next().unwrap().1 {
                        'n' => value.push('\n'),
                        other @ ('"' | '\\') => value.push(other),
                        other => panic!("\\{other} in {line}"),
                    },
                    (_, other) => value.push(other),
                }
            };
            assert!(labels.insert(label.to_owned(), value).is_none(), "{line}");
            rest = &after[end + 1..];
            match rest.strip_prefix(',') {
                Some(more) => rest = more,
                None => break,
            }
        }
        rest = rest.strip_prefix('}').unwrap();
    }
    assert!(is_name(name), "{line}");
    let value = rest.strip_prefix(' ').unwrap().parse().unwrap();
    (name.to_owned(), (labels, value))
}

/// The families of a text, each of which is in one piece and has a help and a type first.
fn parse(text: &str) -> BTreeMap<String, Family> {
    let mut families = BTreeMap::<String, Family>::new();
    let mut current = String::new();
    let mut seen = BTreeSet::new();
    assert!(text.ends_with('\n'));
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            current = help.split_once(' ').unwrap().0.to_owned();
            continue;
        }
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert_eq!(name, current);
            let family = Family {
                kind: kind.to_owned(),
                samples: BTreeMap::new(),
            };
            assert!(families.insert(name.to_owned(), family).is_none(), "{name} twice");
            continue;
        }
        let (name, sample) = sample(line);
        let family = families.get_mut(&current).unwrap();
        let suffix = name.strip_prefix(&current).unwrap();
        match family.kind.as_str() {
            "histogram" => assert!(["_bucket", "_sum", "_count"].contains(&suffix), "{line}"),
            "counter" => assert!(suffix.is_empty() && name.ends_with("_total"), "{line}"),
            _ => assert!(suffix.is_empty() && !name.ends_with("_total"), "{line}"),
        }
        assert!(seen.insert((name.clone(), sample.0.clone())), "{line} twice");
        family.samples.entry(name).or_default().push(sample);
    }
    families
}

/// The text of a machine that has something of everything.
fn scrape() -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.sock");
    let vm = FakeVm::new();
    *vm.pool.lock().unwrap() = Some(some_pool::some_pool());
    vm.attach_disk(DiskConfig::new("/a.raw")).unwrap();
    vm.attach_disk(DiskConfig::new("/b.raw")).unwrap();
    vm.attach_net(NetConfig::new(NetBackend::User)).unwrap();
    let server = Server::bind(&path).unwrap();
    let _server = server.start(Arc::clone(&vm) as Arc<dyn Vm>, || Ok(())).unwrap();
    ask(&path)
}

/// Those of a host's manager.
fn scrape_host() -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("manager.sock");
    let host = FakeHost::new(folder.path().join("vm.sock"));
    let server = Server::bind(&path).unwrap();
    let _server = server.start_host(host as Arc<dyn Host>).unwrap();
    ask(&path)
}

/// Those of disks that are served to others.
fn scrape_share() -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("share.sock");
    let share = Arc::<FakeShare>::default();
    share.disks.lock().unwrap().push("a".to_owned());
    let server = Server::bind(&path).unwrap();
    let _server = server.start_share(share as Arc<dyn Share>).unwrap();
    ask(&path)
}

fn ask(path: &Path) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    body.to_owned()
}

#[test]
fn the_text_is_what_prometheus_reads() {
    let families = parse(&scrape());
    let only = |name: &str, label: (&str, &str)| {
        let samples = families.get(name).unwrap_or_else(|| panic!("no {name}")).samples[name].iter();
        let found: Vec<f64> = samples
            .filter(|(labels, _)| labels.get(label.0).is_some_and(|value| value == label.1))
            .map(|(_, value)| *value)
            .collect();
        assert_eq!(found.len(), 1, "{name}");
        found[0]
    };
    assert_eq!(only("smsvmm_vm_state", ("state", "running")), 1.0);
    assert_eq!(only("smsvmm_vm_state", ("state", "paused")), 0.0);
    assert_eq!(only("smsvmm_disk_size_bytes", ("device", "disk1")), 1_048_576.0);
    assert_eq!(only("smsvmm_volume_state", ("state", "resyncing")), 1.0);
    assert_eq!(only("smsvmm_pool_device_state", ("state", "faulty")), 1.0);
    assert_eq!(only("smsvmm_job_done_bytes", ("job", "3")), 10.0);
    assert_eq!(only("smsvmm_jobs", ("state", "failed")), 1.0);
    let pool = &families["smsvmm_pool_size_bytes"].samples["smsvmm_pool_size_bytes"][0].0;
    assert_eq!(pool["pool"], "po\"ol\\1\n", "escapes come back");
    assert_eq!(pool["vm"], "fake");
    let sums = &families["smsvmm_disk_request_seconds"].samples;
    let of = |suffix: &str| {
        let samples = sums[&format!("smsvmm_disk_request_seconds{suffix}")].iter();
        samples
            .filter(|(labels, _)| labels["device"] == "disk0")
            .collect::<Vec<_>>()
    };
    assert_eq!(of("_sum")[0].1, 10.500_012);
    assert_eq!(of("_count")[0].1, 3.0);
    let buckets = of("_bucket");
    let limit = |sample: &Sample| sample.0["le"].parse::<f64>().unwrap();
    assert!(buckets.is_sorted_by(|one, two| limit(one) < limit(two) && one.1 <= two.1));
    let last = buckets.last().unwrap();
    assert_eq!((limit(last), last.1), (f64::INFINITY, 3.0));
    let eighth = buckets.iter().find(|sample| limit(sample) == 0.000_008).unwrap();
    assert_eq!(eighth.1, 2.0, "less than 8 microseconds");
}

/// All names of metrics in a text.
fn names_in(text: &str) -> BTreeSet<String> {
    text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_')
        .filter(|word| word.starts_with("smsvmm_"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn what_the_dashboard_draws_exists_and_the_documentation_has_it_all() {
    let mut families = parse(&scrape());
    families.extend(parse(&scrape_host()));
    families.extend(parse(&scrape_share()));
    let samples: BTreeSet<&String> = families
        .values()
        .flat_map(|family| family.samples.keys())
        .collect();
    let dashboard = include_str!("../../../docs/src/grafana/smsvmm.json");
    let dashboard: serde_json::Value = serde_json::from_str(dashboard).unwrap();
    let drawn = names_in(&dashboard.to_string());
    assert!(drawn.len() > 15);
    for name in drawn {
        assert!(
            samples.contains(&name),
            "the dashboard draws {name}, which does not exist"
        );
    }
    let told = names_in(include_str!("../../../docs/src/api.md"));
    for (name, family) in &families {
        assert!(told.contains(name), "docs/src/api.md does not tell of {name}");
        assert!(!family.samples.is_empty(), "{name} has no sample in this test");
    }
    for name in told {
        let known = families.contains_key(&name) || samples.contains(&name);
        assert!(known, "docs/src/api.md tells of {name}, which does not exist");
    }
}
