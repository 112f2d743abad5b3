//! A small file system with everything in it, and an editor for its metadata that knows the format from its document alone
//! (`docs/src/formats/filesys.md`): it changes a page and sets all checksums right on the way up to the superblock.

use std::cell::OnceCell;
use std::rc::Rc;

use block_io::sim::{DiskOptions, Ended, RunOptions, Sim, SimClock, SimDisk, World};
use block_io::{AlignedBuffer, BlockDevice, Durability};
use filesys::{
    Access, Attributes, File, FileSystem, FormatOptions, GivenVolume, NewFile, OpenOptions, Snapshot,
};

pub(crate) const META: u64 = 1 << 20;
const DATA: u64 = 16 << 20;
const BLOCK: usize = 4096;

/// The structures that a page of a tree can be: see the document.
pub(crate) const OBJECTS: u8 = 5;
pub(crate) const TABLE: u8 = 4;

pub(crate) type Fs = FileSystem<SimDisk, SimClock>;

/// Files of the image, the tags that their data may have, and how many bytes they have.
pub(crate) const FILES: [(&str, &[u8], u64); 5] = [
    ("/d/base", &[1], 2 << 20),
    ("/d/head", &[1, 2], 2 << 20),
    ("/d/clone", &[1, 3], 2 << 20),
    ("/sums", &[4], 1 << 20),
    ("/thick", &[5], 512 << 10),
];

fn given(sim: &Sim, index: usize) -> GivenVolume<SimDisk> {
    GivenVolume {
        uuid: [index as u8; 16],
        name: format!("v{index}"),
        class: String::new(),
        device: Rc::new(sim.disk(index)),
    }
}

fn options(read_only: bool) -> OpenOptions {
    OpenOptions {
        read_only,
        cached_pages: 64,
        cached_files: 8,
        dirty_pages: 64,
        ..OpenOptions::default()
    }
}

pub(crate) async fn open(sim: &Sim, read_only: bool) -> Result<Fs, filesys::FsError> {
    let volumes = (1..sim.disks().len()).map(|index| given(sim, index)).collect();
    FileSystem::open(Rc::new(sim.disk(0)), volumes, options(read_only), sim.clock()).await
}

/// Sectors that all say whose they are.
async fn fill(file: &File<SimDisk, SimClock>, offset: u64, length: usize, tag: u8) {
    let mut buffer = AlignedBuffer::new(length);
    buffer.as_mut_slice().fill(tag);
    // SAFETY: the buffer lives until the request has ended, and nothing else uses it.
    let memory = [unsafe { buffer.io(0, length) }];
    file.write(offset, &memory, Durability::Volatile)
        .await
        .expect("it can be written");
}

pub(crate) async fn read(file: &File<SimDisk, SimClock>, offset: u64, length: usize) -> Option<Vec<u8>> {
    let buffer = AlignedBuffer::new(length);
    // SAFETY: the buffer lives until the request has ended, and nothing else uses it.
    let memory = [unsafe { buffer.io(0, length) }];
    file.read(offset, &memory).await.ok()?;
    Some(buffer.as_slice().to_vec())
}

async fn make(sim: Sim, close: bool) -> Result<(), filesys::FsError> {
    let format = FormatOptions {
        uuid: [9; 16],
        seed: 77,
        journal_blocks: Some(32),
        grow_to: 0,
    };
    let volumes = vec![given(&sim, 1), given(&sim, 2)];
    let fs = FileSystem::format(given(&sim, 0), volumes, &format, options(false), sim.clock()).await?;
    fs.make_directory("/d", None, 1).await?;
    let thin = |size| NewFile {
        size,
        ..NewFile::default()
    };
    fs.create("/d/base", &thin(2 << 20)).await?;
    let file = fs.open_file("/d/base", Access::Write).await?;
    for at in [0, 65536 * 3 + 4096, 1 << 20] {
        fill(&file, at, 64 << 10, 1).await;
    }
    let snapshot = Snapshot {
        path: "/d/base",
        layer: "/d/head",
        handle: Some(&file),
    };
    fs.snapshot(&[snapshot], 1).await?;
    fill(&file, 65536, 8192, 2).await;
    drop(file);
    fs.clone_file("/d/base", "/d/clone", 1).await?;
    let file = fs.open_file("/d/clone", Access::Write).await?;
    fill(&file, 4096, 4096, 3).await;
    fill(&file, 1 << 20, 8192, 3).await;
    drop(file);
    let with = |size, attributes| NewFile {
        size,
        attributes: Some(attributes),
        now: 1,
    };
    let sums = Attributes {
        checksums: true,
        ..Attributes::default()
    };
    fs.create("/sums", &with(1 << 20, sums)).await?;
    let file = fs.open_file("/sums", Access::Write).await?;
    fill(&file, 65536, 65536, 4).await;
    drop(file);
    for number in 0..48 {
        let name = format!("/d/a-name-that-fills-pages-{number}");
        fs.create(&name, &thin(1 << 20)).await?;
    }
    fs.checkpoint().await?;
    let thick = Attributes {
        thick: true,
        ..Attributes::default()
    };
    fs.create("/thick", &with(512 << 10, thick)).await?;
    let file = fs.open_file("/thick", Access::Write).await?;
    fill(&file, 0, 16384, 5).await;
    file.flush().await.expect("it can be flushed");
    drop(file);
    fs.pin("/d/base", 99).await?;
    fs.delete("/d/a-name-that-fills-pages-7").await?;
    fs.settle().await?;
    if close { fs.close().await } else { fs.sync().await }
}

fn build(close: bool) -> World {
    let data = (1..=2).map(|index| DiskOptions::new(&format!("v{index}"), DATA));
    let mut world = World::new(std::iter::once(DiskOptions::new("meta", META)).chain(data));
    let ran = world.run(&RunOptions::in_order(), |sim| make(sim, close));
    match ran.expect("it is made").ended {
        Ended::Done(result) => result.expect("it is made"),
        Ended::Crashed => panic!("it crashed"),
    }
    world.settle();
    world
}

/// The image, closed in order or with changes in its journal; made once.
pub(crate) fn image(closed: bool) -> World {
    thread_local! {
        static IMAGES: [OnceCell<World>; 2] = const { [OnceCell::new(), OnceCell::new()] };
    }
    IMAGES.with(|images| images[usize::from(closed)].get_or_init(|| build(closed)).clone())
}

/// CRC-32C, by a table: not ours, so that it can tell on ours.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let mut crc = index as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
                bit += 1;
            }
            table[index] = crc;
            index += 1;
        }
        table
    };
    let crc = bytes.iter().fold(!0_u32, |crc, byte| {
        (crc >> 8) ^ TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize]
    });
    !crc
}

/// A page of a tree, and the way to it: blocks from the root down and the slots in them.
#[derive(Debug, Clone)]
pub(crate) struct Page {
    way: Vec<(usize, usize)>,
    pub(crate) block: usize,
    pub(crate) kind: u8,
    pub(crate) level: u8,
}

/// The metadata volume as bytes.
pub(crate) struct Editor {
    pub(crate) bytes: Vec<u8>,
}

const COPIES: [usize; 4] = [0, 16, 32, META as usize / BLOCK - 1];
const ROOT_SLOT: usize = 168;

impl Editor {
    pub(crate) fn of(world: &World) -> Self {
        let mut bytes = vec![0; META as usize];
        world.media[0].peek(0, &mut bytes);
        Self { bytes }
    }

    pub(crate) fn store(&self, world: &mut World) {
        world.media[0].poke(0, &self.bytes);
    }

    pub(crate) fn block(&self, block: usize) -> &[u8] {
        &self.bytes[block * BLOCK..][..BLOCK]
    }

    fn number(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    /// All pages that are reached from the first superblock.
    pub(crate) fn pages(&self) -> Vec<Page> {
        let mut pages = Vec::new();
        self.slot(ROOT_SLOT, 0, &[], &mut pages);
        pages
    }

    /// The page of the slot at a byte of the volume, if it has one, and those below.
    fn slot(&self, at: usize, kind: u8, way: &[(usize, usize)], pages: &mut Vec<Page>) {
        let code = self.bytes[at];
        let kind = if code >> 4 == 0 { kind } else { code >> 4 };
        if code & 0xf != 1 {
            return;
        }
        let page = Page {
            way: way.to_vec(),
            block: self.number(at + 8) as usize,
            kind,
            level: self.bytes[at + 1],
        };
        let (block, below) = (page.block, page.level > 0 || kind == OBJECTS);
        pages.push(page);
        if below {
            for slot in 0..BLOCK / 16 {
                let way = [way, &[(block, slot)]].concat();
                self.slot(block * BLOCK + slot * 16, kind, &way, pages);
            }
        }
    }

    /// Sets the checksums of a page that was changed right, up to all superblocks.
    pub(crate) fn seal(&mut self, page: &Page) {
        let mut crc = crc32c(self.block(page.block));
        for (block, slot) in page.way.iter().rev() {
            let at = block * BLOCK + slot * 16;
            self.bytes[at + 4..at + 8].copy_from_slice(&crc.to_le_bytes());
            crc = crc32c(self.block(*block));
        }
        for copy in COPIES {
            let at = copy * BLOCK + ROOT_SLOT + 4;
            self.bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
            self.seal_superblock(copy);
        }
    }

    fn seal_superblock(&mut self, copy: usize) {
        let at = copy * BLOCK;
        let crc = crc32c(&self.bytes[at + 16..at + 512]);
        self.bytes[at + 8..at + 12].copy_from_slice(&crc.to_le_bytes());
    }

    /// Changes all copies of the superblock alike.
    pub(crate) fn edit_superblocks(&mut self, change: impl Fn(&mut [u8])) {
        for copy in COPIES {
            let at = copy * BLOCK;
            change(&mut self.bytes[at + 16..at + 512]);
            self.seal_superblock(copy);
        }
    }

    /// Blocks of the journal that are whole, in order of their positions.
    pub(crate) fn journal(&self) -> Vec<usize> {
        let (first, count) = (self.number(88) as usize, self.number(96) as usize);
        let mut blocks: Vec<usize> = (first..first + count)
            .filter(|block| self.block(*block).starts_with(b"SMSFSJRN"))
            .collect();
        blocks.sort_by_key(|block| self.number(block * BLOCK + 48));
        blocks
    }

    /// Sets the checksums of the journal right, which is a chain: each group has that of the last block before it.
    pub(crate) fn seal_journal(&mut self, blocks: &[usize]) {
        let mut changed: Vec<([u8; 4], [u8; 4])> = Vec::new();
        for block in blocks {
            let at = block * BLOCK;
            let previous: [u8; 4] = self.bytes[at + 12..at + 16].try_into().unwrap();
            if let Some((_, new)) = changed.iter().find(|(old, _)| *old == previous) {
                self.bytes[at + 12..at + 16].copy_from_slice(new);
            }
            let old: [u8; 4] = self.bytes[at + 8..at + 12].try_into().unwrap();
            let new = crc32c(&self.bytes[at + 12..at + BLOCK]).to_le_bytes();
            self.bytes[at + 8..at + 12].copy_from_slice(&new);
            changed.push((old, new));
        }
    }
}
