//! All that can be asked, in one table.
//!
//! An entry says what a person needs and what a program needs. Statuses that are not named in an entry are problems all the same
//! ([`document`](super::document) adds them as `default`).

use api::storage::{JobStatus, PoolStatus};
use api::virtual_disk::TransferRequest;
use api::{
    ATTACHMENT_PROTOCOL, AdapterRequest, AttachRequest, Attachment, AttachmentMetrics, CONSOLE_PROTOCOL,
    ConsoleRequest, DebugDump, DiskChange, DiskConfig, DiskLimits, DiskStatus, EventPage, HostStatus,
    Liveness, MachineDefinition, MachineEntry, MachineStatus, NetConfig, NetStatus, PoolEntry, Problem,
    ProblemKind, Readiness, Removal, ShareClient, ShareDisk, ShareStatus, SharedDisk, StorageAnswer,
    StorageRequest, TracePage, VmStatus,
};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

use ProblemKind::{
    Conflict, Exhausted, Forbidden, Host, Invalid, KeyReused, NotFound, Precondition, Stopping, Timeout,
    TooLarge,
};

/// The schema of a type.
pub(super) type TypeOf = fn(&mut SchemaGenerator) -> Schema;

fn schema<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

fn text(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string"})
}

/// The header of an answer that is not in all of them.
pub(super) const SOMETIMES: &str = "Link";

/// Where a parameter is.
#[derive(Clone, Copy)]
pub(super) enum In {
    Path,
    Query,
    Header,
}

/// A parameter of a request.
pub(super) struct Parameter {
    pub(super) name: &'static str,
    pub(super) place: In,
    pub(super) required: bool,
    pub(super) about: &'static str,
    pub(super) schema: TypeOf,
}

/// An answer that is no problem.
pub(super) struct Success {
    pub(super) status: u16,
    pub(super) about: &'static str,
    /// Media types and what is in them.
    pub(super) content: Vec<(&'static str, TypeOf)>,
    /// Headers that come with it, and what they say.
    pub(super) headers: Vec<(&'static str, &'static str)>,
}

/// Something that can be asked: a method of a path.
pub(super) struct Operation {
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    /// What generated clients call it.
    pub(super) id: String,
    pub(super) tag: &'static str,
    pub(super) summary: &'static str,
    pub(super) about: &'static str,
    pub(super) parameters: Vec<Parameter>,
    pub(super) body: Option<TypeOf>,
    pub(super) answers: Vec<Success>,
    pub(super) problems: Vec<ProblemKind>,
}

fn operation(
    method: &'static str,
    path: &'static str,
    id: &'static str,
    tag: &'static str,
    summary: &'static str,
) -> Operation {
    Operation {
        method,
        path,
        id: id.to_owned(),
        tag,
        summary,
        about: "",
        parameters: Vec::new(),
        body: None,
        answers: Vec::new(),
        // Another user; the host; a machine that does not answer.
        problems: vec![Forbidden, Host, Timeout],
    }
}

impl Operation {
    fn about(mut self, about: &'static str) -> Self {
        self.about = about;
        self
    }

    fn parameter(mut self, name: &'static str, place: In, about: &'static str, schema: TypeOf) -> Self {
        let required = matches!(place, In::Path);
        self.parameters.push(Parameter {
            name,
            place,
            required,
            about,
            schema,
        });
        if !self.problems.contains(&Invalid) {
            self.problems.push(Invalid);
        }
        self
    }

    fn id(self, about: &'static str) -> Self {
        self.parameter("id", In::Path, about, schema::<api::DeviceId>)
            .problem(NotFound)
    }

    fn body<T: JsonSchema>(mut self) -> Self {
        self.body = Some(schema::<T>);
        self.problems.extend([Invalid, TooLarge]);
        self
    }

    fn answer(self, status: u16, about: &'static str, content: Vec<(&'static str, TypeOf)>) -> Self {
        self.answer_with(status, about, content, Vec::new())
    }

    fn answer_with(
        mut self,
        status: u16,
        about: &'static str,
        content: Vec<(&'static str, TypeOf)>,
        headers: Vec<(&'static str, &'static str)>,
    ) -> Self {
        self.answers.push(Success {
            status,
            about,
            content,
            headers,
        });
        self
    }

    fn json<T: JsonSchema>(self, status: u16, about: &'static str) -> Self {
        self.answer(status, about, vec![("application/json", schema::<T>)])
    }

    /// A list, which can be had in pages.
    fn list<T: JsonSchema>(self, about: &'static str) -> Self {
        self.list_by::<T>(text, about)
    }

    /// The same of what is called by something else than text.
    fn list_by<T: JsonSchema>(self, key: TypeOf, about: &'static str) -> Self {
        let limit: TypeOf = |_| json_schema!({"type": "integer", "minimum": 1, "maximum": api::MAX_PAGE});
        self.parameter(
            "limit",
            In::Query,
            "At most so many entries, in the order of what they are called by; without it and `after`, all.",
            limit,
        )
        .parameter(
            "after",
            In::Query,
            "Only entries behind this one; from the link of the page before.",
            key,
        )
        .answer_with(
            200,
            about,
            vec![("application/json", schema::<Vec<T>>)],
            vec![(
                SOMETIMES,
                "Where there are more: `rel=\"next\"`, relative to the path that was asked for.",
            )],
        )
    }

    /// It makes something, and can be asked again.
    fn repeatable(self) -> Self {
        self.parameter(
            "Idempotency-Key",
            In::Header,
            "Up to 512 visible ASCII characters, another one for each request. The same request with the same key is not done again, and gets the \
             answer of the first one, for which it waits, with the header `Idempotency-Replayed`; another request gets 422. The last 256 keys of 24 hours \
             are kept, as long as the process lives.",
            |_| json_schema!({"type": "string", "minLength": 1, "maxLength": 512, "pattern": "^[!-~]+$"}),
        )
        .problem(KeyReused)
    }

    fn problem(mut self, kind: ProblemKind) -> Self {
        self.problems.push(kind);
        self
    }
}

/// What every server answers, whatever it serves.
pub(super) fn common() -> Vec<Operation> {
    vec![
        operation(
            "get",
            "/openapi.json",
            "getDescription",
            "server",
            "This document",
        )
        .answer(
            200,
            "An OpenAPI 3.1 document.",
            vec![("application/json", |_| json_schema!({"type": "object"}))],
        ),
        operation(
            "get",
            "/healthz",
            "getHealth",
            "server",
            "Whether the server answers",
        )
        .json::<Liveness>(200, "It does."),
    ]
}

/// What is asked of a machine by its management socket.
pub(super) fn machine() -> Vec<Operation> {
    let mut all = common();
    all.extend([
        operation(
            "get",
            "/readyz",
            "getReadiness",
            "server",
            "Whether the machine runs",
        )
        .json::<Readiness>(200, "Its vCPUs run.")
        .json::<Readiness>(503, "It starts, is paused, or is on its way to its end."),
        operation(
            "get",
            "/v1/metrics",
            "getMetrics",
            "server",
            "Numbers for Prometheus",
        )
        .about("Also at `/metrics`. In Prometheus' text format; the names are listed in the documentation.")
        .answer(200, "All numbers as they are now.", vec![("text/plain", text)]),
        operation("get", "/v1/vm", "getVm", "machine", "How the machine is")
            .json::<VmStatus>(200, "The machine."),
        action(
            "/v1/vm/power-button",
            "pressPowerButton",
            "Press the power button",
        )
        .about("It is up to the guest what follows: events tell.")
        .problem(Conflict),
        action(
            "/v1/vm/stop",
            "stop",
            "End the machine at once, as if its cable were pulled",
        ),
        action("/v1/vm/reset", "reset", "Press the reset button"),
        action("/v1/vm/pause", "pause", "Stop all vCPUs").about("Pausing a paused machine succeeds."),
        action("/v1/vm/resume", "resume", "Let the vCPUs run on")
            .about("Disks that stopped because of an error try again. Resuming a running machine succeeds.")
            .problem(Conflict),
        operation(
            "patch",
            "/v1/vm/limit-groups/{id}",
            "changeLimits",
            "machine",
            "Change limits that disks share",
        )
        .about("What is not given stays; 0 takes a limit away.")
        .id("The group.")
        .body::<DiskLimits>()
        .json::<DiskLimits>(200, "The limits that hold now.")
        .problem(Conflict),
    ]);
    all.extend(devices::<DiskConfig, DiskStatus>([
        ("/v1/vm/disks", "listDisks", "All disks"),
        ("/v1/vm/disks", "attachDisk", "Attach a disk"),
        ("/v1/vm/disks/{id}", "getDisk", "A disk"),
        (
            "/v1/vm/disks/{id}",
            "detachDisk",
            "Ask the guest to let a disk go",
        ),
    ]));
    all.push(
        operation(
            "patch",
            "/v1/vm/disks/{id}",
            "changeDisk",
            "devices",
            "Change a disk that is in use",
        )
        .about("What is not given stays.")
        .id("The disk.")
        .body::<DiskChange>()
        .json::<DiskStatus>(200, "The disk as it is now.")
        .problem(Conflict)
        .problem(Stopping),
    );
    all.extend(debugging());
    all.extend(devices::<NetConfig, NetStatus>([
        ("/v1/vm/nets", "listNets", "All network cards"),
        ("/v1/vm/nets", "attachNet", "Attach a network card"),
        ("/v1/vm/nets/{id}", "getNet", "A network card"),
        (
            "/v1/vm/nets/{id}",
            "detachNet",
            "Ask the guest to let a network card go",
        ),
    ]));
    all.extend(storage());
    all.push(events());
    all
}

fn action(path: &'static str, id: &'static str, summary: &'static str) -> Operation {
    operation("put", path, id, "machine", summary)
        .answer(204, "It is done.", Vec::new())
        .problem(Stopping)
}

/// What happened just now.
fn debugging() -> Vec<Operation> {
    vec![
        operation(
            "get",
            "/v1/vm/disks/{id}/trace",
            "getTrace",
            "debugging",
            "The last requests of a disk",
        )
        .about(
            "Requests are told when they have ended: what they did, where, for how long. Some hundred are kept for each thread that \
             serves the disk; ask with `after` again and again to follow it.",
        )
        .id("The disk.")
        .parameter(
            "after",
            In::Query,
            "`next` of an earlier answer; all that are kept if it is not given.",
            text,
        )
        .json::<TracePage>(200, "In the order in which they ended.")
        .problem(Conflict),
        operation(
            "get",
            "/v1/vm/debug",
            "getDebug",
            "debugging",
            "What the machine can tell of itself at one moment",
        )
        .json::<DebugDump>(
            200,
            "Its state, the last events and requests, counters, pools; nothing of what is on the disks.",
        ),
    ]
}

/// A kind of devices: list, attach, look, detach.
fn devices<C: JsonSchema, S: JsonSchema>(
    names: [(&'static str, &'static str, &'static str); 4],
) -> Vec<Operation> {
    let [list, attach, get, detach] = names;
    let of = |method, (path, id, summary)| operation(method, path, id, "devices", summary);
    vec![
        of("get", list).list::<S>("In the order of attachment, if it is no page."),
        of("post", attach)
            .about("Paths are absolute. An identifier that is not given becomes the first that is free.")
            .repeatable()
            .body::<C>()
            .answer_with(
                201,
                "It is on the guest's bus; an event tells when the guest uses it.",
                vec![("application/json", schema::<S>)],
                vec![("Location", "Its path.")],
            )
            .problem(Conflict)
            .problem(NotFound)
            .problem(Exhausted),
        of("get", get).id("The device.").json::<S>(200, "It."),
        of("delete", detach)
            .about("The guest decides: a `device-removed` or `device-remove-refused` event after `after_event` tells how it went.")
            .id("The device.")
            .json::<Removal>(202, "The guest was asked.")
            .problem(Conflict)
            .problem(Stopping),
    ]
}

/// What is asked of a pool, of a machine or by itself.
pub(super) fn storage() -> Vec<Operation> {
    vec![
        operation("post", "/v1/storage", "storage", "storage", "Do something with the pool, its files or its disks")
            .about(
                "One request, one answer. Some take long: scrubs, merges, moves. The connection then stays open without a \
                 word, for up to 24 hours; three such requests hold no other one up. `begin` instead of `pool` does not wait for the \
                 jobs that it starts: they are in the pool's status, and go on when the connection breaks.",
            )
            .repeatable()
            .body::<StorageRequest>()
            .json::<StorageAnswer>(200, "What came of it.")
            .problem(NotFound)
            .problem(Conflict)
            .problem(Exhausted)
            .problem(Stopping),
        operation("post", "/v1/storage/transfer", "transfer", "storage", "Move data into the pool or out of it")
            .about(
                "Leaves HTTP: after 101 the connection carries the protocol `smsvmm-transfer`, in both directions, until \
                 either end closes it. It is internal to smsvmm, may change with any version, and is used by \
                 `smsvmm disk import | export | copy`. The client must not send anything before it has the answer. \
                 Four at a time.",
            )
            .upgrade("smsvmm-transfer")
            .body::<TransferRequest>()
            .answer_with(
                101,
                "The connection is taken out of HTTP.",
                Vec::new(),
                vec![("Upgrade", "`smsvmm-transfer`."), ("Connection", "`upgrade`.")],
            )
            .problem(NotFound)
            .problem(Conflict)
            .problem(Exhausted),
    ]
}

impl Operation {
    fn upgrade(self, protocol: &'static str) -> Self {
        let protocol: TypeOf = match protocol {
            ATTACHMENT_PROTOCOL => |_| json_schema!({"const": ATTACHMENT_PROTOCOL}),
            CONSOLE_PROTOCOL => |_| json_schema!({"const": CONSOLE_PROTOCOL}),
            _ => |_| json_schema!({"const": "smsvmm-transfer"}),
        };
        let mut operation = self.parameter(
            "Upgrade",
            In::Header,
            "What the connection is to become; with `Connection: upgrade`.",
            protocol,
        );
        operation
            .parameters
            .iter_mut()
            .for_each(|parameter| parameter.required = true);
        operation
    }
}

/// The console of a machine.
fn console() -> Operation {
    operation("post", "/v1/vms/{name}/console", "openConsole", "machines", "Use a machine's serial console")
        .about(
            "Leaves HTTP: after 101 the connection carries what the guest shows and, unless it only looks on, what is typed. One may type \
             (else 409) and four may look on (else 503); who takes nothing for half a minute is let go. The client must not send anything \
             before it has the answer.",
        )
        .machine()
        .upgrade(CONSOLE_PROTOCOL)
        .body::<ConsoleRequest>()
        .answer_with(
            101,
            "The connection is taken out of HTTP.",
            Vec::new(),
            vec![("Upgrade", "`smsvmm-console`."), ("Connection", "`upgrade`.")],
        )
        .problem(Conflict)
        .problem(Exhausted)
}

/// Events, of whatever has them.
pub(super) fn events() -> Operation {
    let number: TypeOf = schema::<u64>;
    operation("get", "/v1/events", "getEvents", "events", "What happened, and what happens")
        .about(
            "Without `Accept: text/event-stream`, a page: events with numbers above `after`; if there are none, the answer waits \
             for the first, up to `wait` seconds. With it, a stream of server-sent events until the machine ends: `id` is \
             the number, `data` an `Event` as JSON; an event of the type `missed` says how many are no longer kept. A client that \
             sends `Last-Event-ID` goes on where it was. Sixteen streams at a time.",
        )
        .parameter("after", In::Query, "Only events with higher numbers; 0 if not given.", number)
        .parameter("wait", In::Query, "Seconds to wait for the first event, at most 60; for pages only.", number)
        .parameter("Last-Event-ID", In::Header, "As `after`, and goes before it.", number)
        .answer(
            200,
            "A page, or a stream.",
            vec![("application/json", schema::<EventPage>), ("text/event-stream", text)],
        )
        .problem(Exhausted)
}

/// What is asked of a gateway about itself.
pub(super) fn gateway() -> Vec<Operation> {
    let mut all = common();
    all.push(
        operation(
            "get",
            "/v1/vms",
            "listMachines",
            "gateway",
            "The machines that one may know",
        )
        .list::<MachineEntry>("In the order of the gateway's configuration, if it is no page."),
    );
    all.push(console());
    all
}

/// What is asked of `smsvmm share`.
pub(super) fn share() -> Vec<Operation> {
    let mut all = common();
    let of = |method, path, id, summary| operation(method, path, id, "share", summary);
    let name = |operation: Operation| {
        let about = "What the disk is called here; a / in it is written %2F.";
        operation
            .parameter("name", In::Path, about, text)
            .problem(NotFound)
    };
    all.extend([
        operation(
            "get",
            "/v1/metrics",
            "getMetrics",
            "server",
            "Numbers for Prometheus",
        )
        .about("Also at `/metrics`. In Prometheus' text format; the names are listed in the documentation.")
        .answer(200, "All numbers as they are now.", vec![("text/plain", text)]),
        of("get", "/v1/share", "getShare", "What is served, and to whom")
            .json::<ShareStatus>(200, "Disks and clients.")
            .problem(Stopping),
        of("put", "/v1/share/stop", "stopShare", "End it as SIGTERM does")
            .about("What clients have asked for is answered; then the process ends.")
            .answer(202, "It was told.", Vec::new()),
        of(
            "get",
            "/v1/share/disks",
            "listSharedDisks",
            "All disks that are served",
        )
        .list::<SharedDisk>("In the order in which they came, if it is no page.")
        .problem(Stopping),
        of("post", "/v1/share/disks", "addSharedDisk", "Serve one more disk")
            .about("Those that are connected notice nothing, or are told as their protocol has it.")
            .repeatable()
            .body::<ShareDisk>()
            .answer_with(
                201,
                "It is served.",
                vec![("application/json", schema::<SharedDisk>)],
                vec![("Location", "Its path.")],
            )
            .problem(NotFound)
            .problem(Conflict)
            .problem(Exhausted)
            .problem(Stopping),
        name(of("get", "/v1/share/disks/{name}", "getSharedDisk", "A disk"))
            .json::<SharedDisk>(200, "It.")
            .problem(Stopping),
        name(of(
            "delete",
            "/v1/share/disks/{name}",
            "removeSharedDisk",
            "Serve a disk no more",
        ))
        .about("What is in flight is answered; those who use others notice nothing.")
        .answer(204, "Others can use the disk.", Vec::new())
        .problem(Exhausted)
        .problem(Stopping),
        of("get", "/v1/share/clients", "listShareClients", "Who is connected")
            .list::<ShareClient>("In the order in which they came, if it is no page.")
            .problem(Stopping),
        of(
            "delete",
            "/v1/share/clients/{id}",
            "disconnectShareClient",
            "Disconnect a client",
        )
        .about("What it has in flight is answered. It may come again.")
        .parameter("id", In::Path, "By which it is listed.", text)
        .problem(NotFound)
        .answer(204, "It is gone.", Vec::new())
        .problem(Exhausted)
        .problem(Stopping),
    ]);
    all.push(events());
    all.extend(
        storage()
            .into_iter()
            .filter(|operation| operation.path == "/v1/storage"),
    );
    all
}

/// What is asked of a host's manager, beside what it passes on to machines.
pub(super) fn host() -> Vec<Operation> {
    let mut all = common();
    let of = |method, path, id, summary| operation(method, path, id, "machines", summary);
    all.extend([
        operation("get", "/readyz", "getReadiness", "server", "Whether the manager has opened its pools")
            .json::<Readiness>(200, "It has."),
        operation("get", "/v1/metrics", "getMetrics", "server", "Numbers for Prometheus")
            .about("Also at `/metrics`. In Prometheus' text format; the names are listed in the documentation.")
            .answer(200, "All numbers as they are now.", vec![("text/plain", text)]),
        operation("get", "/v1/host", "getHost", "host", "How the host is")
            .json::<HostStatus>(200, "Pools, machines, and disks in use."),
        operation("get", "/v1/pools", "listPools", "storage", "All pools")
            .list::<PoolEntry>("In the order of host.toml, if it is no page."),
        operation("get", "/v1/pools/{pool}/jobs", "listJobs", "storage", "The jobs of a pool")
            .pool()
            .list_by::<JobStatus>(schema::<u32>, "In the order of their numbers; of those that have ended, the last.")
            .problem(Conflict)
            .problem(Stopping),
        operation("get", "/v1/pools/{pool}", "getPool", "storage", "A pool")
            .pool()
            .json::<PoolStatus>(200, "It, with its devices, volumes and jobs.")
            .problem(Conflict)
            .problem(Stopping),
        of("get", "/v1/vms", "listMachines", "All machines")
            .list::<MachineStatus>("In the order of their names."),
        of("get", "/v1/vms/{name}", "getMachine", "A machine")
            .machine()
            .tagged("It."),
        of("put", "/v1/vms/{name}", "defineMachine", "Define a machine, or change its definition")
            .about("A change counts when the machine is started next. Doing it twice does it once.")
            .machine()
            .conditional()
            .body::<MachineDefinition>()
            .tagged("The machine as it is now."),
        of("delete", "/v1/vms/{name}", "deleteMachine", "Forget a machine that is stopped")
            .about("Its disks stay.")
            .machine()
            .conditional()
            .answer(204, "It is forgotten.", Vec::new())
            .problem(Conflict),
        of("put", "/v1/vms/{name}/start", "startMachine", "Start a machine")
            .about("Starting one that runs succeeds.")
            .machine()
            .json::<MachineStatus>(202, "Its process is started; `running` when it answers.")
            .problem(Conflict)
            .problem(Stopping),
        of("put", "/v1/vms/{name}/shutdown", "shutDownMachine", "Ask a guest to shut down")
            .about("After `power.shutdown-timeout` of its definition it is stopped hard. It is not started again.")
            .machine()
            .json::<MachineStatus>(202, "It was asked."),
        of("put", "/v1/vms/{name}/stop", "stopMachine", "Stop a machine hard")
            .about("Also one that does not answer. It is not started again.")
            .machine()
            .json::<MachineStatus>(202, "It ends."),
        operation("get", "/v1/attachments", "listAttachments", "attachments", "Disks in use")
            .list::<Attachment>("Those that the manager serves."),
        operation("get", "/v1/attachments/counters", "listCounters", "attachments", "What was asked of disks in use")
            .about("All numbers grow from zero since the machine has the disk: two answers and the time between them give rates.")
            .list::<AttachmentMetrics>("Of those that the manager serves."),
        operation("post", "/v1/attachments", "attach", "attachments", "Use a disk of a pool")
            .about(
                "Leaves HTTP: after 101 the connection speaks vhost-user, with the manager as back-end; or, of a SCSI disk, it tells how the \
                 disk is, while its adapter has the queues. The disk is in use as long as it lives. For the processes of machines; not \
                 through a gateway.",
            )
            .upgrade(ATTACHMENT_PROTOCOL)
            .body::<AttachRequest>()
            .answer_with(
                101,
                "The connection is taken out of HTTP.",
                Vec::new(),
                vec![("Upgrade", "`smsvmm-vhost-user`."), ("Connection", "`upgrade`.")],
            )
            .problem(NotFound)
            .problem(Conflict)
            .problem(Exhausted)
            .problem(Stopping),
        operation("patch", "/v1/attachments/{name}/{id}", "changeAttachment", "attachments", "Change a disk in use")
            .about("Limits and polling; what is not given stays.")
            .machine()
            .id("The disk's name in the machine.")
            .body::<DiskChange>()
            .json::<Attachment>(200, "It."),
        operation("get", "/v1/attachments/{name}/{id}/trace", "traceAttachment", "attachments", "The last requests of a disk in use")
            .machine()
            .id("The disk's name in the machine.")
            .parameter("after", In::Query, "`next` of an earlier answer; all that are kept if it is not given.", text)
            .json::<TracePage>(200, "In the order in which they ended."),
        operation(
            "patch",
            "/v1/attachments/{name}/limit-groups/{id}",
            "changeAttachmentGroup",
            "attachments",
            "Change limits that disks of a machine share",
        )
        .about("What is not given stays; 0 takes a limit away.")
        .machine()
        .id("The limits' name in the machine.")
        .body::<DiskLimits>()
        .json::<DiskLimits>(200, "What holds now."),
        operation("post", "/v1/scsi-adapters", "attachAdapter", "attachments", "Use a machine's SCSI disks")
            .about(
                "Leaves HTTP: after 101 the connection speaks vhost-user-scsi, with the manager as back-end. The machine's SCSI disks \
                 are asked for before, one by one. For the processes of machines; not through a gateway.",
            )
            .upgrade(ATTACHMENT_PROTOCOL)
            .body::<AdapterRequest>()
            .answer_with(
                101,
                "The connection is taken out of HTTP.",
                Vec::new(),
                vec![("Upgrade", "`smsvmm-vhost-user`."), ("Connection", "`upgrade`.")],
            )
            .problem(Conflict)
            .problem(Exhausted)
            .problem(Stopping),
        console(),
        events(),
    ]);
    all.extend(storage());
    all.extend(storage().into_iter().map(|operation| {
        let of_one = match operation.path {
            "/v1/storage" => ("/v1/pools/{pool}/storage", "storageOfPool"),
            _ => ("/v1/pools/{pool}/storage/transfer", "transferOfPool"),
        };
        Operation {
            path: of_one.0,
            id: of_one.1.to_owned(),
            ..operation
        }
        .pool()
    }));
    all
}

impl Operation {
    fn machine(self) -> Self {
        self.parameter("name", In::Path, "The machine.", schema::<api::VmName>)
            .problem(NotFound)
    }

    fn tagged(self, about: &'static str) -> Self {
        self.answer_with(
            200,
            about,
            vec![("application/json", schema::<MachineStatus>)],
            vec![
                (
                    "ETag",
                    "Its definition's revision; whatever the machine does, it stays.",
                ),
                ("Cache-Control", "`no-store`."),
            ],
        )
    }

    fn conditional(self) -> Self {
        self.parameter(
            "If-Match",
            In::Header,
            "Only if this is the `ETag`, or one of these; `*`: only if it is there.",
            text,
        )
        .parameter("If-None-Match", In::Header, "`*`: only if it is not there.", text)
        .problem(Precondition)
    }

    fn pool(self) -> Self {
        self.parameter("pool", In::Path, "The pool.", text)
            .problem(NotFound)
    }
}

/// The schema of all problems.
pub(super) fn problem(generator: &mut SchemaGenerator) -> Schema {
    schema::<Problem>(generator)
}

/// What is in a stream or in log files, and in no answer by itself.
pub(super) fn further(generator: &mut SchemaGenerator) {
    schema::<api::Event>(generator);
}

/// The name of a machine, for gateways.
pub(super) fn machine_name() -> Parameter {
    Parameter {
        name: "name",
        place: In::Path,
        required: true,
        about: "The machine.",
        schema: schema::<api::VmName>,
    }
}
