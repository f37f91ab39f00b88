// Serve the test page, stand in for CVAT's server between the page and the function, and drive
// headless Chromium. Tests that ask the real function need two environment variables: FUNCTION_URL,
// the address of a running local_server.py, and FRAMES, a folder of JPEGs named by their number.

import { createHmac, randomBytes } from 'node:crypto';
import { access, readFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import { join } from 'node:path';
import { chromium } from 'playwright-core';
import { JOB } from './collections.js';

const HERE = import.meta.dirname;
export const NAME = 'Segment Anything 2: Tracker';
const HANG_MS = 120_000; // ends a test that waits for what never happens; no test is this slow
const TYPES = { js: 'text/javascript', html: 'text/html' };
const TRACKER = {
    id: 'pth-facebookresearch-sam2-tracker',
    name: NAME,
    kind: 'tracker',
    supportedShapeTypes: ['mask', 'polygon', 'rectangle', 'ellipse'],
};

/** What CVAT's server does with a tracker call; a test may change its answers. */
class CvatServer {
    #key = randomBytes(16);

    constructor() {
        this.reset();
    }

    reset() {
        this.loggedIn = true;
        this.functions = [TRACKER, { ...TRACKER, id: 'det', name: 'Detector', kind: 'detector' }];
        this.received = []; // every tracker request
        this.answered = []; // the requests that the function answered, each with its `answer`
        /** Tests replace this: (request, forward) => {status, body}; null cuts the connection. */
        this.interpose = (_request, forward) => forward();
    }

    list() {
        return this.loggedIn
            ? { status: 200, body: this.functions } : { status: 401, body: 'log in first' };
    }

    async call(request) {
        this.received.push(request);
        return this.interpose(request, () => this.#forward(request));
    }

    async #forward(request) {
        const { frame, shapes, states = [] } = request;
        const unsigned = states.map((state) => this.#unsign(state));
        if (unsigned.includes(undefined)) {
            return { status: 400, body: 'Invalid or expired tracker state' };
        }
        const image = await readFile(join(process.env.FRAMES, `${String(frame).padStart(5, '0')}.jpg`));
        const response = await fetch(process.env.FUNCTION_URL, {
            method: 'POST',
            headers: { 'Content-Type': 'application/json' },
            body: JSON.stringify({
                image: image.toString('base64'),
                shapes: shapes ?? states.map(() => null),
                states: unsigned,
            }),
        });
        if (!response.ok) { // CVAT passes on the status, not the function's message
            return { status: response.status, body: `${response.status} Server Error` };
        }
        const answer = await response.json();
        this.answered.push({ ...request, answer: structuredClone(answer) });
        const signed = answer.states.map((state) => this.#sign(state));
        return { status: 200, body: { ...answer, states: signed } };
    }

    /** Make all states invalid, as CVAT does after 8 hours. */
    expireStates() {
        this.#key = randomBytes(16);
    }

    #sign(state) {
        const text = JSON.stringify(state);
        return `${text}:${createHmac('sha256', this.#key).update(text).digest('base64url')}`;
    }

    #unsign(signed) {
        const text = signed.slice(0, signed.lastIndexOf(':'));
        const state = JSON.parse(text);
        return signed === this.#sign(state) ? state : undefined;
    }

    /** The function's answers for one object, by frame. */
    answers(index = 0) {
        return new Map(this.answered.filter(({ type }) => type === 'track')
            .map(({ frame, answer }) => [frame, answer.shapes[index]]));
    }
}

async function readBody(request) {
    const chunks = [];
    for await (const chunk of request) {
        chunks.push(chunk);
    }
    return JSON.parse(Buffer.concat(chunks).toString());
}

async function serveFile(path, response) {
    response.setHeader('Content-Type', TYPES[path.split('.').pop()]);
    response.end(await readFile(path));
}

async function handle(cvat, request, response) {
    const { pathname } = new URL(request.url, 'http://localhost');
    if (pathname.startsWith('/api/lambda/functions')) {
        const answer = request.method === 'POST'
            ? await cvat.call(await readBody(request)) : cvat.list();
        // Chromium repeats a request by itself if a reused connection is cut.
        response.setHeader('Connection', 'close');
        if (!answer) {
            request.socket.destroy();
            return;
        }
        const { status, body } = answer;
        response.writeHead(status).end(status === 200 ? JSON.stringify(body) : body);
    } else if (pathname === '/sam2_tracker_action.js') {
        await serveFile(join(HERE, '..', 'sam2_tracker_action.js'), response);
    } else if (/^\/page\/\w+\.js$/.test(pathname)) {
        await serveFile(join(HERE, pathname), response);
    } else { // CVAT's UI is one page under all addresses
        await serveFile(join(HERE, 'page', 'index.html'), response);
    }
}

/** Open a job with a collection. */
export async function openJob(page, collection, changes = {}) {
    await page.evaluate(
        ([job, objects]) => globalThis.testPage.openJob(job, objects),
        [{ ...JOB, ...changes }, collection],
    );
}

/** Run the action; return null, or the error message that the annotator sees. */
export async function run(page, frame, target, options = {}) {
    const { convert = true, every = 1, ...rest } = options;
    const parameters = {
        'Target frame': target,
        'Convert polygon shapes to tracks': String(convert),
        'Keyframe every N frames': every,
    };
    return page.evaluate(
        (input) => globalThis.testPage.run(input), { name: NAME, frame, parameters, ...rest },
    );
}

/** What an annotator can read in the notice, on one line; '' if there is none. */
export async function noticeText(page) {
    const notice = page.locator('.sam2-tracker-notice');
    return await notice.count() ? (await notice.innerText()).replace(/\s+/g, ' ') : '';
}

/** Start the page's server and the browser; `close` stops both. */
export async function start() {
    await access('/usr/bin/chromium').catch(() => {
        throw new Error("/usr/bin/chromium is missing: install Debian's package chromium");
    });
    const cvat = new CvatServer();
    const server = createServer((request, response) => {
        handle(cvat, request, response).catch((error) => {
            response.writeHead(599).end(String(error.stack)); // an error in this file
        });
    });
    await new Promise((resolve) => { server.listen(0, '127.0.0.1', resolve); });
    const address = `http://127.0.0.1:${server.address().port}`;
    const browser = await chromium.launch({
        executablePath: '/usr/bin/chromium',
        args: [
            '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
            '--disable-background-networking', '--disable-component-update', '--disable-sync',
        ],
    });
    return {
        cvat,
        /** Open a page of the site with its own session; `consoleTexts` gets what it logs. */
        async open(path = '/tasks/4/jobs/4') {
            const context = await browser.newContext();
            context.setDefaultTimeout(HANG_MS);
            const page = await context.newPage();
            page.consoleTexts = [];
            page.on('console', (message) => page.consoleTexts.push(message.text()));
            page.on('pageerror', (error) => page.consoleTexts.push(`uncaught: ${error}`));
            await page.goto(address + path);
            return page;
        },
        /** Close all open pages, and with them their scripts. */
        async closePages() {
            await Promise.all(browser.contexts().map((context) => context.close()));
        },
        async close() {
            await browser.close();
            server.closeAllConnections();
            await new Promise((resolve) => { server.close(resolve); });
        },
    };
}
