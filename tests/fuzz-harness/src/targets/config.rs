//! vm.toml: any text gives a configuration or an error that names its place; what loads is written out as a text that loads
//! to the same.

use std::path::Path;

use arbitrary::Unstructured;
use vmm::config::VmConfig;

/// Pieces of configurations, good and bad.
const PIECES: &[&str] = &[
    "name = \"web1\"\n",
    "cpus = 2\n",
    "memory = \"1G\"\n",
    "rng = false\n",
    "[boot]\nkernel = \"vmlinuz\"\n",
    "initrd = \"initrd.img\"\n",
    "cmdline = \"console=ttyS0\"\n",
    "[[disk]]\nimage = \"a.raw\"\n",
    "id = \"disk0\"\n",
    "read-only = true\n",
    "queues = 4\n",
    "queue-size = 128\n",
    "serial = \"abc\"\n",
    "[[net]]\nbackend = \"user\"\n",
    "[[net]]\nbackend = \"tap\"\ntap = \"tap0\"\n",
    "mac = \"52:54:00:00:00:01\"\n",
    "forward = [\"tcp:8080:80\"]\n",
    "mtu = 9000\n",
    "[console]\nserial = \"null\"\n",
    "virtio = \"socket:c.sock\"\n",
    "escape = \"ctrl-a\"\n",
    "[cpus]\ncount = 4\ncores = 2\n",
    "features = [\"-avx\"]\naffinity = [\"0-3\"]\n",
    "[memory]\nsize = \"512M\"\nhuge-pages = \"2M\"\n",
    "[management]\nsocket = \"m.sock\"\n",
    "[sandbox]\npaths = [\"/tmp\"]\n",
    "[power]\non-reboot = \"stop\"\n",
    "size = 18446744073709551616\n",
    "count = -1\n",
    "count = 1e400\n",
    "id = 1979-05-27T07:32:00Z\n",
    "a.b.c.d = { e = [[[]]] }\n",
    "x = '''\n",
    "\"\\u0000\" = 0x\n",
    "= [ { \" \n",
];

const OVERRIDES: &[&str] = &[
    "name=7",
    "cpus=64",
    "cpus.count=3",
    "memory=0",
    "memory=99999999999T",
    "disk.0.image=b.raw",
    "disk.99.image=b",
    "net.0.mac=nonsense",
    "boot.cmdline=quiet",
    "=",
    "a",
    "boot.=x",
    "boot..kernel=x",
    "disk=[{image=\"q\"}]",
    "console.serial=file:/x",
];

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let mut overrides = Vec::new();
    for _ in 0..input.int_in_range(0..=3)? {
        overrides.push(text(input, OVERRIDES)?);
    }
    let mut document = String::new();
    if !input.ratio(1, 8)? {
        document.push_str("name = \"vm\"\n[boot]\nkernel = \"k\"\n");
    }
    while !input.is_empty() && document.len() < 1 << 16 {
        document.push_str(&text(input, PIECES)?);
    }
    let load = |text: &str, overrides: &[String]| {
        VmConfig::from_text(text, Path::new("vm.toml"), Path::new("/folder"), overrides)
    };
    match load(&document, &overrides) {
        Ok(config) => {
            let written = toml::to_string(&config).expect("what was read can be written");
            let again = load(&written, &[]).unwrap_or_else(|error| panic!("{error}\n{written}"));
            assert_eq!(again, config, "{written}");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    Ok(())
}

/// Mostly one of `pieces`, sometimes with a byte changed, rarely anything.
fn text(input: &mut Unstructured<'_>, pieces: &[&str]) -> arbitrary::Result<String> {
    match input.int_in_range(0..=15_u8)? {
        0..=11 => Ok((*input.choose(pieces)?).to_owned()),
        12..=14 => {
            let mut bytes = input.choose(pieces)?.as_bytes().to_vec();
            let place = input.choose_index(bytes.len())?;
            bytes[place] = input.arbitrary()?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        }
        _ => {
            let mut bytes = vec![0; input.int_in_range(0..=64)?];
            input.fill_buffer(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        }
    }
}
