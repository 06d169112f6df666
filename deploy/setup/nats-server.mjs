/**
 * Owns finding a nats-server: LAMINA_NATS_SERVER, PATH, an earlier download in .lamina/bin, the official release
 * (checked), the distribution's package (unpacked into .lamina/bin: no root needed, no service started), Homebrew, in this
 * order. Every candidate must run and be recent enough.
 */
import { createHash } from 'node:crypto';
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';
import process from 'node:process';
import { REPO_ROOT, runQuietly, SetupError, say } from './run.mjs';

const OLDEST_VERSION = [2, 9, 10];
const EXECUTABLE = process.platform === 'win32' ? 'nats-server.exe' : 'nats-server';
const DOWNLOADED = join(REPO_ROOT, '.lamina', 'bin', EXECUTABLE);
const WHAT_TO_DO =
  'Install nats-server (https://docs.nats.io/running-a-nats-service/introduction/installation), or name one with LAMINA_NATS_SERVER, or use a server that runs already with --nats-url.';

const RELEASE_VERSION = '2.12.15';
/**
 * SHA256 of the official archives, as the makers' own container recipes pin them (github.com/nats-io/nats-docker).
 * Those do not name the macOS archives: these are checked against the release's SHA256SUMS, fetched over HTTPS from the
 * same release, which finds a damaged download but not a replaced release.
 */
const RELEASE_SHA256 = {
  'linux-amd64.tar.gz': '58ab8131f819263897e2fc38e503e1b755b63bcafeecc7d12582487df48ca15e',
  'linux-arm64.tar.gz': 'b724db99fefbf8f5c808baa82819ee50350aee9734017e4a478f7e545cef3ab6',
  'linux-arm7.tar.gz': '72311fe4e14ce3ce22dc8e7ac02633e6f31a9bab4086c92a31fd040e59683c8a',
  'linux-ppc64le.tar.gz': '56447e72ec0551fa27a4368388dee475e028d4d5de6d97a802d944c6f278cf1e',
  'linux-s390x.tar.gz': '5db960be875da499f1354f41c0a7780303fb9644cf62d35022677e77b4178029',
  'windows-amd64.zip': 'ed2f6d265abb6c6b151b077d1b6810d006f6e01453d864104de5ce4dc6ee6c27',
};
const OPERATING_SYSTEMS = { linux: 'linux', darwin: 'darwin', win32: 'windows' };
const ARCHITECTURES = { x64: 'amd64', arm64: 'arm64', arm: 'arm7', ppc64: 'ppc64le', s390x: 's390x' };

/**
 * Why a program cannot be used as nats-server; null if it can.
 * @param {string} path
 */
async function unfit(path) {
  const result = await runQuietly(path, ['--version']);
  const version = /v?(\d+)\.(\d+)\.(\d+)/.exec(result.output)?.slice(1).map(Number);
  if (!result.ok || version === undefined) return `${path} does not run as nats-server`;
  for (const [place, oldest] of OLDEST_VERSION.entries()) {
    if (version[place] > oldest) return null;
    if (version[place] < oldest) return `${path} is ${version.join('.')}, older than ${OLDEST_VERSION.join('.')}`;
  }
  return null;
}

/** @param {string} name */
function onPath(name) {
  return (process.env.PATH ?? '')
    .split(delimiter)
    .filter((folder) => folder !== '')
    .map((folder) => join(folder, name))
    .find((path) => existsSync(path));
}

/**
 * Moves a found binary to where the next run looks for it.
 * @param {string} found
 */
function keep(found) {
  mkdirSync(join(REPO_ROOT, '.lamina', 'bin'), { recursive: true });
  const partial = `${DOWNLOADED}.${process.pid}`;
  copyFileSync(found, partial);
  renameSync(partial, DOWNLOADED);
}

/** @param {(folder: string) => Promise<boolean>} work */
async function inTemporaryFolder(work) {
  const folder = mkdtempSync(join(tmpdir(), 'lamina-setup-'));
  try {
    return await work(folder);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

function fromDebianPackage() {
  if (onPath('apt-get') === undefined || onPath('dpkg-deb') === undefined) return Promise.resolve(false);
  return inTemporaryFolder(async (folder) => {
    const download = () => runQuietly('apt-get', ['download', 'nats-server'], { cwd: folder });
    if (!(await download()).ok) {
      // A new machine has no package lists yet.
      const update = ['apt-get', 'update', '-qq'];
      const root = process.getuid?.() === 0;
      const updated = root ? await runQuietly('apt-get', update.slice(1)) : await runQuietly('sudo', ['-n', ...update]);
      if (!updated.ok || !(await download()).ok) return false;
    }
    const archive = readdirSync(folder).find((file) => file.endsWith('.deb'));
    if (archive === undefined || !(await runQuietly('dpkg-deb', ['-x', archive, '.'], { cwd: folder })).ok)
      return false;
    const binary = ['usr/sbin', 'usr/bin']
      .map((place) => join(folder, place, EXECUTABLE))
      .find((path) => existsSync(path));
    if (binary === undefined || (await unfit(binary)) !== null) return false;
    keep(binary);
    return true;
  });
}

async function fromHomebrew() {
  const brew = onPath('brew');
  if (brew === undefined || !(await runQuietly(brew, ['install', '--quiet', 'nats-server'])).ok) return undefined;
  const prefix = (await runQuietly(brew, ['--prefix', 'nats-server'])).output.trim();
  return join(prefix, 'bin', EXECUTABLE);
}

/** @param {string} url */
async function fetchBytes(url) {
  const response = await fetch(url, { signal: AbortSignal.timeout(120_000) });
  if (!response.ok) throw new Error(`${url}: HTTP ${response.status}`);
  return Buffer.from(await response.arrayBuffer());
}

/** The official release. Throws with the reason if it cannot be had or is not what it should be. */
function fromRelease() {
  const system = OPERATING_SYSTEMS[process.platform];
  const architecture = ARCHITECTURES[process.arch];
  if (system === undefined || architecture === undefined) {
    throw new Error(`there is no official release for ${process.platform} ${process.arch}`);
  }
  const folderUrl = `https://github.com/nats-io/nats-server/releases/download/v${RELEASE_VERSION}`;
  const suffix = `${system}-${architecture}.${system === 'windows' ? 'zip' : 'tar.gz'}`;
  const archive = `nats-server-v${RELEASE_VERSION}-${suffix}`;
  return inTemporaryFolder(async (folder) => {
    const bytes = await fetchBytes(`${folderUrl}/${archive}`);
    const expected = RELEASE_SHA256[suffix] ?? (await publishedSha256(`${folderUrl}/SHA256SUMS`, archive));
    const actual = createHash('sha256').update(bytes).digest('hex');
    if (actual !== expected) throw new Error(`${archive} has SHA256 ${actual}, expected ${expected}`);
    writeFileSync(join(folder, archive), bytes);
    // tar of Windows and macOS reads zip files as well.
    const unpacked = await runQuietly('tar', ['-xf', archive], { cwd: folder });
    if (!unpacked.ok) throw new Error(`${archive} cannot be unpacked: ${unpacked.output.trim()}`);
    const binary = join(folder, archive.replace(/\.(zip|tar\.gz)$/, ''), EXECUTABLE);
    const reason = await unfit(binary);
    if (reason !== null) throw new Error(reason);
    keep(binary);
    return true;
  });
}

/**
 * @param {string} url
 * @param {string} archive
 */
async function publishedSha256(url, archive) {
  const lines = (await fetchBytes(url)).toString().split('\n');
  const line = lines.find((candidate) => candidate.trim().split(/[ *]+/).at(-1) === archive);
  if (line === undefined) throw new Error(`${url} does not name ${archive}`);
  return line.trim().split(/\s/)[0];
}

/**
 * Path of a nats-server that runs.
 * @returns {Promise<string>}
 * @throws {SetupError} that says what to do
 */
export async function findNatsServer() {
  const named = process.env.LAMINA_NATS_SERVER;
  if (named !== undefined && named !== '') {
    const reason = await unfit(named);
    if (reason !== null) throw new SetupError(`LAMINA_NATS_SERVER: ${reason}. ${WHAT_TO_DO}`);
    return named;
  }
  const notes = [];
  for (const candidate of [onPath(EXECUTABLE), DOWNLOADED]) {
    if (candidate === undefined || !existsSync(candidate)) continue;
    const reason = await unfit(candidate);
    if (reason === null) return candidate;
    notes.push(reason);
  }

  say('getting nats-server (there is none on PATH)');
  try {
    await fromRelease();
    return DOWNLOADED;
  } catch (error) {
    const cause = error instanceof Error && error.cause instanceof Error ? ` (${error.cause.message})` : '';
    notes.push(`official release: ${error instanceof Error ? error.message : error}${cause}`);
  }
  // Distributions may be years behind: Debian 12 has the oldest that will do.
  if (await fromDebianPackage()) return DOWNLOADED;
  const brewed = await fromHomebrew();
  if (brewed !== undefined && (await unfit(brewed)) === null) return brewed;
  throw new SetupError(`No nats-server: ${notes.join('; ')}. ${WHAT_TO_DO}`);
}
