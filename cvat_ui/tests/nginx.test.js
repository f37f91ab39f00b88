// The snippet under a real nginx with a site like that of CVAT's UI: answers with the snippet are
// compared with those of the same nginx without it.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { copyFile, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { gunzipSync } from 'node:zlib';
import { request as httpRequest } from 'node:http';

const UI = join(import.meta.dirname, '..');
const TAG = '<script defer src="/sam2_tracker_action.js"></script>';
const INDEX = '<!doctype html><html><head><title>CVAT</title></head><body></head></body></html>\n';
const FILES = {
    'index.html': INDEX,
    'assets/app.js': 'const html = "</head>";\n',
    'assets/app.css': '/* </head> */\n',
    'assets/data.json': '{"text": "</head>"}\n',
    'assets/logo.svg': '<svg xmlns="http://www.w3.org/2000/svg"><desc></desc></svg>\n',
    'notes.txt': '</head>\n',
};
/** The relevant part of react_nginx.conf in CVAT's UI. */
const site = (socket, root) => `
server {
    listen unix:${socket};
    root ${root};
    gzip on;
    gzip_types application/javascript text/javascript;
    location / {
        try_files $uri $uri/ /index.html;
        add_header Cache-Control "no-cache, no-store, must-revalidate";
        add_header Pragma "no-cache";
        add_header Cross-Origin-Opener-Policy "same-origin";
        add_header Cross-Origin-Embedder-Policy "credentialless";
        add_header Expires 0;
        add_header X-Frame-Options "deny";
    }
    location /assets {
        expires 1y;
        add_header Cache-Control "public";
        add_header Cross-Origin-Embedder-Policy "require-corp";
        access_log off;
    }
}
`;
const main = (folder) => `
daemon off;
master_process off;
pid ${folder}/nginx.pid;
error_log stderr warn;
events {}
http {
    include /etc/nginx/mime.types;
    default_type application/octet-stream;
    access_log off;
    ${['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi']
        .map((name) => `${name}_temp_path ${folder}/${name};`).join('\n    ')}
    include ${folder}/conf.d/*.conf;
}
`;

let folder;
const servers = [];

function get(socketPath, path, headers = {}) {
    return new Promise((resolve, reject) => {
        httpRequest({ socketPath, path, headers, agent: false }, async (response) => {
            const chunks = [];
            for await (const chunk of response) {
                chunks.push(chunk);
            }
            resolve({
                status: response.statusCode,
                headers: response.headers,
                body: Buffer.concat(chunks),
            });
        }).on('error', reject).end();
    });
}

/** Start nginx with or without the snippet; return its socket when it answers. */
async function startNginx(name, files) {
    const prefix = join(folder, name);
    await mkdir(join(prefix, 'conf.d'), { recursive: true });
    const socket = join(prefix, 'socket');
    await writeFile(join(prefix, 'nginx.conf'), main(prefix));
    await writeFile(join(prefix, 'conf.d', 'default.conf'), site(socket, join(folder, 'html')));
    for (const file of files) {
        await copyFile(join(UI, file), join(prefix, 'conf.d', file));
    }
    const nginx = spawn('/usr/sbin/nginx', ['-p', prefix, '-c', join(prefix, 'nginx.conf')]);
    let errors = '';
    nginx.stderr.on('data', (data) => { errors += data; });
    nginx.on('error', () => { errors += "/usr/sbin/nginx is missing: install Debian's nginx-light"; });
    servers.push(nginx);
    for (;;) {
        const answer = await get(socket, '/').catch(() => null);
        if (answer) {
            assert.equal(errors, ''); // nor any warning
            return socket;
        }
        assert.ok(nginx.pid && nginx.exitCode === null, `nginx did not start: ${errors}`);
    }
}

let plain;
let filtered;

before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'cvat-ui-nginx-'));
    await mkdir(join(folder, 'html', 'assets'), { recursive: true });
    for (const [path, text] of Object.entries(FILES)) {
        await writeFile(join(folder, 'html', path), text);
    }
    await copyFile(
        join(UI, 'sam2_tracker_action.js'), join(folder, 'html', 'sam2_tracker_action.js'),
    );
    plain = await startNginx('plain', []);
    filtered = await startNginx('filtered', ['sam2_tracker.conf']);
});
after(async () => {
    for (const nginx of servers.filter(({ exitCode, pid }) => pid && exitCode === null)) {
        nginx.kill();
        await once(nginx, 'exit');
    }
    await rm(folder, { recursive: true });
});

/** The headers without the date and those of the length, which the longer page changes. */
function comparable({ date, 'content-length': length, 'transfer-encoding': encoding, ...headers }) {
    return headers;
}

for (const path of ['/', '/index.html', '/tasks/4/jobs/4']) {
    test(`${path}: the tag is before the first </head>, and nowhere else`, async () => {
        const [without, with_] = [await get(plain, path), await get(filtered, path)];

        assert.equal(without.body.toString(), INDEX);
        assert.equal(with_.body.toString(), INDEX.replace('</head>', `${TAG}</head>`));
        assert.equal(with_.status, 200);
        // No validators: a browser must not take an old copy without the tag for unchanged.
        const {
            etag, 'last-modified': modified, 'accept-ranges': ranges, ...others
        } = comparable(without.headers);
        assert.ok(etag && modified && ranges);
        assert.deepEqual(comparable(with_.headers), others);
        assert.equal(with_.headers['cross-origin-embedder-policy'], 'credentialless');
    });
}

test('the tag is in the compressed page too', async () => {
    const answer = await get(filtered, '/', { 'Accept-Encoding': 'gzip' });

    assert.equal(answer.headers['content-encoding'], 'gzip');
    assert.ok(gunzipSync(answer.body).toString().includes(`${TAG}</head><body>`));
});

for (const path of Object.keys(FILES).filter((name) => name !== 'index.html')) {
    test(`${path} passes through unchanged, headers included`, async () => {
        const [without, with_] = [await get(plain, `/${path}`), await get(filtered, `/${path}`)];

        assert.equal(with_.body.toString(), FILES[path]);
        const [expected, actual] = [without, with_]
            .map(({ status, headers }) => ({ status, ...headers, date: '', expires: '' }));
        assert.deepEqual(actual, expected);
    });
}

test('the script is served as JavaScript that browsers do not cache', async () => {
    const answer = await get(filtered, '/sam2_tracker_action.js');

    assert.equal(answer.status, 200);
    assert.match(answer.headers['content-type'], /^(application|text)\/javascript$/);
    assert.match(answer.headers['cache-control'], /no-store/);
    assert.deepEqual(answer.body, await readFile(join(UI, 'sam2_tracker_action.js')));
});
