//! Metrics in Prometheus' text format, version 0.0.4.
//!
//! A writer of our own, and no client library: libraries keep registries of counters that live as long as the process, while
//! here everything is counted where it happens, comes as one [`Metrics`], and is written once. The format is a dozen lines.
//!
//! Names and labels are an interface: they change only as `docs/src/api.md` says. All begin with `smsvmm_`; a machine's have the
//! label `vm`. What has a state has a sample for each state, of which one is 1 ("state set"), so that alarms can ask for one.

use std::fmt::{Display, Write as _};

use api::storage::{Health, JobState, MemberHealth, PoolDeviceState, PoolStatus};
use api::{
    AttachmentMetrics, DeviceState, HostStatus, Latencies, MachineState, Metrics, NetMetrics, QueueMetrics,
    RequestCounts, ShareStatus, VmState, VmStatus,
};
use hyper::StatusCode;
use serde::Serialize;

use crate::routes::{self, Answer};

const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The answer to `GET /metrics`.
pub(crate) fn answer(metrics: &Metrics) -> Answer {
    routes::respond(StatusCode::OK, MEDIA_TYPE, text(metrics).into_bytes())
}

/// The same of `smsvmm share`.
pub(crate) fn share(status: &ShareStatus) -> Answer {
    routes::respond(StatusCode::OK, MEDIA_TYPE, of_share(status).into_bytes())
}

/// A label and its value.
type Label<'a> = (&'a str, &'a str);

/// A metric with all its samples.
struct Family<'a> {
    text: &'a mut String,
    name: &'static str,
    labels: &'a [Label<'a>],
}

/// Writes families that have some labels in common.
struct Writer<'a> {
    text: String,
    common: Vec<Label<'a>>,
}

impl<'a> Writer<'a> {
    fn family(&mut self, name: &'static str, kind: &str, help: &str) -> Family<'_> {
        // Writing to a string cannot fail.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        Family {
            text: &mut self.text,
            name,
            labels: &self.common,
        }
    }

    fn gauge(&mut self, name: &'static str, help: &str) -> Family<'_> {
        self.family(name, "gauge", help)
    }

    fn counter(&mut self, name: &'static str, help: &str) -> Family<'_> {
        self.family(name, "counter", help)
    }
}

impl Family<'_> {
    fn sample(&mut self, labels: &[Label<'_>], value: impl Display) {
        self.sample_of("", labels, value);
    }

    fn sample_of(&mut self, suffix: &str, labels: &[Label<'_>], value: impl Display) {
        self.text.push_str(self.name);
        self.text.push_str(suffix);
        let mut separator = '{';
        for (name, value) in self.labels.iter().chain(labels) {
            let _ = write!(self.text, "{separator}{name}=\"");
            escape(self.text, value);
            self.text.push('"');
            separator = ',';
        }
        if separator == ',' {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }

    /// One sample for each state; 1 for the present one.
    fn states<S: Serialize + PartialEq>(&mut self, labels: &[Label<'_>], all: &[S], present: &S) {
        for state in all {
            let name = name_of(state);
            let labels = [labels, &[("state", name.as_str())]].concat();
            self.sample(&labels, u8::from(state == present));
        }
    }

    fn histogram(&mut self, labels: &[Label<'_>], latencies: &Latencies) {
        let mut below = 0;
        let last = latencies.classes.len() - 1;
        for (class, count) in latencies.classes.iter().enumerate() {
            below += count;
            let limit = if class == last {
                "+Inf".to_owned()
            } else {
                seconds(1 << class)
            };
            let labels = [labels, &[("le", limit.as_str())]].concat();
            self.sample_of("_bucket", &labels, below);
        }
        self.sample_of("_sum", labels, seconds(latencies.sum_us));
        self.sample_of("_count", labels, below);
    }
}

/// Microseconds in seconds, exactly.
fn seconds(microseconds: u64) -> String {
    let text = format!("{}.{:06}", microseconds / 1_000_000, microseconds % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// The name of a state as it is in JSON.
fn name_of(state: &impl Serialize) -> String {
    let json = serde_json::to_value(state).unwrap_or_default();
    json.as_str().unwrap_or_default().to_owned()
}

fn escape(text: &mut String, value: &str) {
    for letter in value.chars() {
        match letter {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            other => text.push(other),
        }
    }
}

/// All of it as text.
fn text(metrics: &Metrics) -> String {
    let vm = metrics.vm.as_ref();
    let mut writer = Writer {
        text: String::new(),
        common: vm.map(|vm| ("vm", vm.name.as_str())).into_iter().collect(),
    };
    writer
        .gauge("smsvmm_build_info", "The version of smsvmm; always 1.")
        .sample(&[("version", env!("CARGO_PKG_VERSION"))], 1);
    if let Some(status) = &metrics.host {
        host(&mut writer, status);
        attachments(&mut writer, &metrics.attachments);
    }
    if let Some(vm) = vm {
        machine(&mut writer, vm);
        devices(&mut writer, vm);
    }
    if !metrics.queues.is_empty() {
        queues(&mut writer, &metrics.queues);
    }
    if !metrics.nets.is_empty() {
        nets(&mut writer, &metrics.nets);
    }
    if !metrics.pools.is_empty() {
        pools(&mut writer, &metrics.pools);
        volumes(&mut writer, &metrics.pools);
        jobs(&mut writer, &metrics.pools);
        files(&mut writer, &metrics.pools);
    }
    writer.text
}

fn machine(writer: &mut Writer<'_>, vm: &VmStatus) {
    use VmState::{Paused, Running, Starting, Stopping};
    let all = [Starting, Running, Paused, Stopping];
    writer
        .gauge(
            "smsvmm_vm_state",
            "Where the machine is in its life: 1 for its state.",
        )
        .states(&[], &all, &vm.state);
    writer
        .gauge(
            "smsvmm_vm_uptime_seconds",
            "Seconds since the machine was started.",
        )
        .sample(&[], vm.uptime_seconds);
    writer
        .counter("smsvmm_vm_resets_total", "How often the machine was reset.")
        .sample(&[], vm.resets);
    writer
        .counter("smsvmm_vm_events_total", "Events that were recorded.")
        .sample(&[], vm.last_event);
    writer
        .gauge("smsvmm_vm_cpus", "Number of vCPUs.")
        .sample(&[], vm.cpus);
    writer
        .gauge("smsvmm_vm_memory_bytes", "Size of the guest's memory.")
        .sample(&[], vm.memory.bytes());
}

fn host(writer: &mut Writer<'_>, host: &HostStatus) {
    use MachineState::{Failed, Running, Starting, Stopped, Stopping, Waiting};
    let help = "Seconds since the manager was started.";
    let mut family = writer.gauge("smsvmm_manager_uptime_seconds", help);
    family.sample(&[("host", &host.name)], host.uptime_seconds);
    let mut family = writer.counter("smsvmm_manager_events_total", "Events that were recorded.");
    family.sample(&[("host", &host.name)], host.last_event);
    let help = "Where a machine of the manager is in its life: 1 for its state.";
    let mut family = writer.gauge("smsvmm_machine_state", help);
    let all = [Stopped, Starting, Running, Stopping, Waiting, Failed];
    for machine in &host.machines {
        family.states(&[("vm", machine.name.as_str())], &all, &machine.state);
    }
    let help = "How often a machine was started again since somebody started it.";
    let mut family = writer.gauge("smsvmm_machine_restarts", help);
    for machine in &host.machines {
        family.sample(&[("vm", machine.name.as_str())], machine.restarts);
    }
}

/// What is served to others, as text.
fn of_share(status: &ShareStatus) -> String {
    let kind = status.kind.to_string();
    let mut writer = Writer {
        text: String::new(),
        common: vec![("share", &kind)],
    };
    let help = "Seconds since the process was started.";
    writer
        .gauge("smsvmm_share_uptime_seconds", help)
        .sample(&[], status.uptime_seconds);
    let help = "Clients that are connected to disks that are served to others.";
    writer
        .gauge("smsvmm_share_clients", help)
        .sample(&[], status.clients.len());
    let mut sizes = writer.gauge(
        "smsvmm_share_size_bytes",
        "Size of a disk that is served to others.",
    );
    for disk in &status.disks {
        sizes.sample(&[("disk", &disk.name)], disk.size);
    }
    let counted = status.disks.iter().filter_map(|disk| {
        Some(Row {
            labels: vec![("disk", &disk.name)],
            counts: disk.counts.as_ref()?,
            latencies: disk.latencies.as_ref()?,
        })
    });
    let rows: Vec<_> = counted.collect();
    if rows.is_empty() {
        return writer.text;
    }
    let families = Requests {
        requests: (
            "smsvmm_share_requests_total",
            "Requests of clients to disks that are served to others, by operation.",
        ),
        bytes: (
            "smsvmm_share_bytes_total",
            "Bytes in read and write requests of clients to disks that are served to others.",
        ),
        errors: (
            "smsvmm_share_errors_total",
            "Requests of clients that were not answered with success.",
        ),
        seconds: (
            "smsvmm_share_request_seconds",
            "From the moment that a request of a client was taken to its answer.",
        ),
    };
    families.write(&mut writer, &rows);
    writer.text
}

/// The disks that a manager serves.
fn attachments(writer: &mut Writer<'_>, all: &[AttachmentMetrics]) {
    fn labels(disk: &AttachmentMetrics) -> [Label<'_>; 4] {
        let attachment = &disk.attachment;
        [
            ("vm", attachment.vm.as_str()),
            ("device", attachment.device.as_str()),
            ("pool", &attachment.pool),
            ("file", &attachment.file),
        ]
    }
    if all.is_empty() {
        return;
    }
    let rows: Vec<_> = all
        .iter()
        .map(|disk| Row {
            labels: labels(disk).to_vec(),
            counts: &disk.counts,
            latencies: &disk.latencies,
        })
        .collect();
    let families = Requests {
        requests: (
            "smsvmm_attachment_requests_total",
            "Requests of machines to disks that the manager serves, by operation.",
        ),
        bytes: (
            "smsvmm_attachment_bytes_total",
            "Bytes in read and write requests to disks that the manager serves.",
        ),
        errors: (
            "smsvmm_attachment_errors_total",
            "Requests to disks that the manager serves that were not answered with success.",
        ),
        seconds: (
            "smsvmm_attachment_request_seconds",
            "From the moment that the manager took a request of a machine to its answer.",
        ),
    };
    families.write(writer, &rows);
}

/// What was asked of a disk, and by which labels that is known.
struct Row<'a> {
    labels: Vec<Label<'a>>,
    counts: &'a RequestCounts,
    latencies: &'a Latencies,
}

/// The families of requests to disks: names and descriptions.
struct Requests {
    requests: (&'static str, &'static str),
    bytes: (&'static str, &'static str),
    errors: (&'static str, &'static str),
    seconds: (&'static str, &'static str),
}

impl Requests {
    fn write(&self, writer: &mut Writer<'_>, rows: &[Row<'_>]) {
        let (name, help) = self.requests;
        let mut family = writer.counter(name, help);
        for row in rows {
            for (operation, value) in [
                ("read", row.counts.reads),
                ("write", row.counts.writes),
                ("flush", row.counts.flushes),
                ("other", row.counts.others),
            ] {
                family.sample(&[&row.labels[..], &[("operation", operation)]].concat(), value);
            }
        }
        let (name, help) = self.bytes;
        let mut family = writer.counter(name, help);
        for row in rows {
            for (operation, value) in [
                ("read", row.counts.read_bytes),
                ("write", row.counts.written_bytes),
            ] {
                family.sample(&[&row.labels[..], &[("operation", operation)]].concat(), value);
            }
        }
        let (name, help) = self.errors;
        let mut family = writer.counter(name, help);
        for row in rows {
            family.sample(&row.labels, row.counts.errors);
        }
        let (name, help) = self.seconds;
        let mut family = writer.family(name, "histogram", help);
        for row in rows {
            family.histogram(&row.labels, row.latencies);
        }
    }
}

fn devices(writer: &mut Writer<'_>, vm: &VmStatus) {
    use DeviceState::{Active, Attached, Failed, Removing, Waiting};
    let all = [Attached, Active, Removing, Waiting, Failed];
    let mut states = writer.gauge(
        "smsvmm_device_state",
        "Where a device is in its life: 1 for its state.",
    );
    for disk in &vm.disks {
        let labels = [("device", disk.config.id.as_str()), ("kind", "disk")];
        states.states(&labels, &all, &disk.state);
    }
    for net in &vm.nets {
        let labels = [("device", net.config.id.as_str()), ("kind", "net")];
        states.states(&labels, &all, &net.state);
    }
    let mut sizes = writer.gauge("smsvmm_disk_size_bytes", "What the guest sees as a disk's size.");
    for disk in &vm.disks {
        sizes.sample(&[("device", disk.config.id.as_str())], disk.size.bytes());
    }
    let help = "1 if a disk's requests wait until the machine is resumed, because one failed.";
    let mut stopped = writer.gauge("smsvmm_disk_stopped", help);
    for disk in &vm.disks {
        let value = u8::from(disk.stopped.is_some());
        stopped.sample(&[("device", disk.config.id.as_str())], value);
    }
}

fn queues(writer: &mut Writer<'_>, queues: &[QueueMetrics]) {
    let numbered: Vec<(&QueueMetrics, String)> = queues
        .iter()
        .map(|queue| (queue, queue.queue.to_string()))
        .collect();
    let rows: Vec<_> = numbered
        .iter()
        .map(|(queue, number)| Row {
            labels: of_queue(queue, number).to_vec(),
            counts: &queue.counts,
            latencies: &queue.latencies,
        })
        .collect();
    let families = Requests {
        requests: (
            "smsvmm_disk_requests_total",
            "Requests of the guest, by operation.",
        ),
        bytes: (
            "smsvmm_disk_bytes_total",
            "Bytes in read and write requests of the guest.",
        ),
        errors: (
            "smsvmm_disk_errors_total",
            "Requests that were not answered with success.",
        ),
        seconds: (
            "smsvmm_disk_request_seconds",
            "From the moment that a request was taken from the guest to its answer.",
        ),
    };
    families.write(writer, &rows);
    let mut family = writer.counter("smsvmm_disk_interrupts_total", "Interrupts sent to the guest.");
    for (queue, number) in &numbered {
        family.sample(&of_queue(queue, number), queue.interrupts);
    }
}

fn of_queue<'a>(queue: &'a QueueMetrics, number: &'a str) -> [Label<'a>; 2] {
    [("device", queue.device.as_str()), ("queue", number)]
}

fn nets(writer: &mut Writer<'_>, nets: &[NetMetrics]) {
    type Value = fn(&NetMetrics) -> u64;
    let families: [(&'static str, &str, Value, Value); 4] = [
        (
            "smsvmm_net_packets_total",
            "Packets; received and sent are the guest's view.",
            |net| net.received_packets,
            |net| net.sent_packets,
        ),
        (
            "smsvmm_net_bytes_total",
            "Bytes of packets, with Ethernet's header.",
            |net| net.received_bytes,
            |net| net.sent_bytes,
        ),
        (
            "smsvmm_net_dropped_total",
            "Packets that were lost.",
            |net| net.received_dropped,
            |net| net.sent_dropped,
        ),
        (
            "smsvmm_net_waits_total",
            "How often packets had to wait: received ones for the guest, sent ones for the host.",
            |net| net.receive_waits,
            |net| net.send_waits,
        ),
    ];
    for (name, help, received, sent) in families {
        let mut family = writer.counter(name, help);
        for net in nets {
            let device = ("device", net.device.as_str());
            family.sample(&[device, ("direction", "received")], received(net));
            family.sample(&[device, ("direction", "sent")], sent(net));
        }
    }
}

const HEALTH: [Health; 4] = [
    Health::Healthy,
    Health::Resyncing,
    Health::Degraded,
    Health::Failed,
];

fn pools(writer: &mut Writer<'_>, pools: &[PoolStatus]) {
    let mut family = writer.gauge("smsvmm_pool_state", "How well a pool is: 1 for its state.");
    for pool in pools {
        family.states(&[("pool", &pool.name)], &HEALTH, &pool.state);
    }
    let mut family = writer.gauge("smsvmm_pool_size_bytes", "What a pool's devices can hold.");
    for pool in pools {
        family.sample(&[("pool", &pool.name)], pool.size);
    }
    let mut family = writer.gauge("smsvmm_pool_used_bytes", "What of that is taken by volumes.");
    for pool in pools {
        family.sample(&[("pool", &pool.name)], pool.used);
    }
    use PoolDeviceState::{Active, Evacuating, Faulty, Missing, Returned, Spare};
    let all = [Active, Spare, Evacuating, Missing, Returned, Faulty];
    let devices = || {
        pools.iter().flat_map(|pool| {
            let labels = |id, path| [("pool", pool.name.as_str()), ("device", id), ("path", path)];
            let devices = pool.devices.iter();
            devices.map(move |device| (device, labels(&device.id, &device.name)))
        })
    };
    let mut family = writer.gauge(
        "smsvmm_pool_device_state",
        "How a device stands to its pool: 1 for its state.",
    );
    for (device, labels) in devices() {
        family.states(&labels, &all, &device.state);
    }
    let mut family = writer.gauge("smsvmm_pool_device_size_bytes", "What a device can hold.");
    for (device, labels) in devices() {
        family.sample(&labels, device.size);
    }
    let mut family = writer.gauge(
        "smsvmm_pool_device_used_bytes",
        "What of that is taken by volumes.",
    );
    for (device, labels) in devices() {
        family.sample(&labels, device.used);
    }
    let help = "Requests that failed on a device since the pool was opened.";
    let mut family = writer.counter("smsvmm_pool_device_errors_total", help);
    for (device, labels) in devices() {
        if let Some(errors) = device.errors {
            family.sample(&labels, errors);
        }
    }
}

fn volumes(writer: &mut Writer<'_>, pools: &[PoolStatus]) {
    let volumes = || {
        pools.iter().flat_map(|pool| {
            let labels = |volume| [("pool", pool.name.as_str()), ("volume", volume)];
            let volumes = pool.volumes.iter();
            volumes.map(move |volume| (volume, labels(&volume.name)))
        })
    };
    let mut family = writer.gauge("smsvmm_volume_state", "How well a volume is: 1 for its state.");
    for (volume, labels) in volumes() {
        family.states(&labels, &HEALTH, &volume.state);
    }
    let mut family = writer.gauge("smsvmm_volume_size_bytes", "The size of a volume.");
    for (volume, labels) in volumes() {
        family.sample(&labels, volume.size);
    }
    let help = "What a volume takes on devices, redundancy and logs included.";
    let mut family = writer.gauge("smsvmm_volume_used_bytes", help);
    for (volume, labels) in volumes() {
        family.sample(&labels, volume.used);
    }
    let help = "Parts of a volume on devices, copies and columns, by what they are good for.";
    let mut family = writer.gauge("smsvmm_volume_members", help);
    for (volume, [pool, name]) in volumes() {
        use MemberHealth::{Filling, InSync, Missing, Stale};
        for state in [InSync, Filling, Stale, Missing] {
            let count = volume
                .members
                .iter()
                .filter(|member| member.state == state)
                .count();
            family.sample(&[pool, name, ("state", &name_of(&state))], count);
        }
    }
}

fn jobs(writer: &mut Writer<'_>, pools: &[PoolStatus]) {
    use JobState::{Cancelled, Done, Failed, Paused, Running};
    let mut family = writer.gauge("smsvmm_jobs", "Jobs that the pool remembers, by state.");
    for pool in pools {
        for state in [Running, Paused, Done, Cancelled, Failed] {
            let count = pool.jobs.iter().filter(|job| job.state == state).count();
            family.sample(&[("pool", &pool.name), ("state", &name_of(&state))], count);
        }
    }
    let live: Vec<_> = pools
        .iter()
        .flat_map(|pool| pool.jobs.iter().map(move |job| (pool, job, job.id.to_string())))
        .filter(|(_, job, _)| job.is_live())
        .collect();
    let mut family = writer.gauge("smsvmm_job_done_bytes", "What a job that has not ended has done.");
    for (pool, job, id) in &live {
        family.sample(
            &[("pool", &pool.name), ("job", id), ("kind", &job.kind)],
            job.done,
        );
    }
    let mut family = writer.gauge(
        "smsvmm_job_total_bytes",
        "All that a job that has not ended has to do.",
    );
    for (pool, job, id) in &live {
        family.sample(
            &[("pool", &pool.name), ("job", id), ("kind", &job.kind)],
            job.total,
        );
    }
}

fn files(writer: &mut Writer<'_>, pools: &[PoolStatus]) {
    type Value = fn(&api::file::FileSystemStatus) -> u64;
    let systems: Vec<_> = pools
        .iter()
        .filter_map(|pool| Some((pool, pool.files.as_ref()?)))
        .collect();
    if systems.is_empty() {
        return;
    }
    let families: [(&'static str, &str, Value); 4] = [
        (
            "smsvmm_files_size_bytes",
            "Bytes that files of a pool can have.",
            |files| files.size,
        ),
        ("smsvmm_files_free_bytes", "Bytes that no file has.", |files| {
            files.free
        }),
        (
            "smsvmm_files_meta_size_bytes",
            "Bytes of the metadata volume.",
            |files| files.meta_size,
        ),
        (
            "smsvmm_files_meta_free_bytes",
            "Bytes of it that are free.",
            |files| files.meta_free,
        ),
    ];
    for (name, help, value) in families {
        let mut family = writer.gauge(name, help);
        for (pool, files) in &systems {
            family.sample(&[("pool", &pool.name)], value(files));
        }
    }
    type OfVolume = fn(&api::file::DataVolume) -> u64;
    let families: [(&'static str, &str, OfVolume); 4] = [
        (
            "smsvmm_files_volume_size_bytes",
            "Bytes that files can have on a volume.",
            |volume| volume.size,
        ),
        (
            "smsvmm_files_volume_free_bytes",
            "Bytes of a volume that no file has.",
            |volume| volume.free,
        ),
        (
            "smsvmm_files_volume_draining",
            "1 if a volume gets nothing new.",
            |volume| volume.draining.into(),
        ),
        (
            "smsvmm_files_volume_failed",
            "1 if a volume takes no writes any more.",
            |volume| volume.failed.into(),
        ),
    ];
    for (name, help, value) in families {
        let mut family = writer.gauge(name, help);
        for (pool, files) in &systems {
            for volume in &files.volumes {
                family.sample(&[("pool", &pool.name), ("volume", &volume.name)], value(volume));
            }
        }
    }
}
