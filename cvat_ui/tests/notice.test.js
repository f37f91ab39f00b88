// What an annotator reads: the progress, the notice after a run, and the picture behind it. The tests
// give the function's answers: no function is asked.

import assert from 'node:assert/strict';
import { after, before, beforeEach, describe, test } from 'node:test';
import { BLOCK, DISC, shape } from './collections.js';
import * as harness from './harness.js';

const { NAME } = harness;
// A failed call as CVAT 2.54 words it.
const PYTHON_TEXT = "HTTPConnectionPool(host='host.docker.internal', port=18080): Max retries exceeded "
    + 'with url: / (Caused by NewConnectionError("HTTPConnection(host=\'host.docker.internal\', '
    + 'port=18080): Failed to establish a new connection: [Errno 111] Connection refused"))';
const LONG_WORD = 'x'.repeat(500);

let site;
let page;
let cvat;

before(async () => {
    site = await harness.start();
    cvat = site.cvat;
    page = await site.open();
    await page.waitForFunction((name) => globalThis.testPage.find(name), NAME);
});
after(() => site.close());
beforeEach(() => {
    cvat.reset();
    answer();
});

const openJob = (...rest) => harness.openJob(page, ...rest);
const run = (...rest) => harness.run(page, ...rest);
const noticeText = () => harness.noticeText(page);
const notice = () => page.locator('.sam2-tracker-notice');
const details = () => notice().getByText('Details', { exact: true });
const closeButton = () => notice().getByRole('button', { name: 'Close' });
const events = (key) => page.evaluate((name) => globalThis.testPage.events
    .map((event) => event[name]).filter((value) => value !== undefined), key);

const polygon = (clientID, changes) => shape(clientID, 'polygon', DISC.polygon, changes);

/** Answer with the shapes that the objects started with, changed by `change`. */
function answer(change = (started) => started) {
    let started;
    cvat.interpose = ({ type, frame, shapes }) => {
        started = type === 'init_tracking' ? shapes : started;
        const states = started.map(() => 'state');
        return {
            status: 200,
            body: { shapes: started.map((object, i) => change(object, frame, i)), states },
        };
    };
}

/** Fail on a frame; `body` is the server's text. */
function failOn(frame, status, body) {
    answer();
    const { interpose } = cvat;
    cvat.interpose = (request) => (
        request.frame === frame ? { status, body } : interpose(request)
    );
}

describe('progress', () => {
    test('it is reported in whole percents', async () => {
        await openJob({ shapes: [polygon(9)] });

        assert.equal(await run(0, 7), null);

        assert.deepEqual(await events('percent'), [0, 14, 28, 42, 57, 71, 85, 100]);
    });
});

describe('the notice of a run that is done', () => {
    test('it tells frames, objects, time and how to undo', async () => {
        await openJob({ shapes: [polygon(9), shape(8, 'mask', DISC.mask)] }, { deletedFrames: [2] });

        assert.equal(await run(0, 4), null);

        assert.match(
            await noticeText(),
            /^Segment Anything 2: Tracker × Done: 2 objects on 3 frames \(1 to 4\) in \d+ s\. One undo takes it back\.$/,
        );
        assert.equal(await notice().getByRole('status').count(), 1);

        assert.equal(await run(5, 5), 'Target frame is the current frame, 5: nothing to do. '
            + 'Choose a later frame, or an earlier one to track backwards.');

        assert.equal(await noticeText(), ''); // the run before is no longer the last one
    });

    test('a single frame, backwards', async () => {
        await openJob({ shapes: [polygon(9, { frame: 5 })] });

        assert.equal(await run(5, 4), null);

        assert.match(await noticeText(), /Done: 1 object on 1 frame \(4\) in \d+ s\./);
    });

    test('it names the objects that were lost, and on how many frames', async () => {
        await openJob({ shapes: [polygon(9), shape(8, 'mask', DISC.mask)] });
        answer((object, frame, i) => (i === 1 && frame > 2 ? null : object));

        assert.equal(await run(0, 5), null);

        assert.match(await noticeText(), / 1 object lost on some frames: oval \(3 of 5\)\. One undo/);
    });

    test('of many lost objects it names the five that were lost longest', async () => {
        await openJob({ shapes: Array.from({ length: 7 }, (_, i) => polygon(9 + i)) });
        answer((object, frame, i) => (frame <= i + 1 ? null : object));

        assert.equal(await run(0, 8), null);

        assert.match(await noticeText(), / 7 objects lost on some frames: oval \(7 of 8\), oval \(6 of 8\), oval \(5 of 8\), oval \(4 of 8\), oval \(3 of 8\), and 2 more\./);
    });

    test('there is one notice, however many runs there were', async () => {
        await openJob({ shapes: [polygon(9)] });
        for (const target of [2, 3, 4]) {
            assert.equal(await run(0, target), null);
        }

        assert.equal(await notice().count(), 1);
        assert.match(await noticeText(), /on 4 frames \(1 to 4\)/);
    });
});

describe('the notice of a failed run', () => {
    test('plain words; the raw text is under details', async () => {
        await openJob({ shapes: [polygon(9)] });
        failOn(3, 503, PYTHON_TEXT);

        assert.equal(await run(0, 5), null);

        assert.equal(
            await noticeText(),
            `${NAME} × Frame 3 failed: the function does not answer (503). Kept: frames 0 to 2. `
            + 'One undo takes it back. If the picture is not up to date, change the frame. Details',
        );
        assert.equal(await notice().getByRole('alert').count(), 1);

        await details().click();

        assert.ok((await noticeText()).endsWith(PYTHON_TEXT));
    });

    test('the raw text is shown as text, never as HTML', async () => {
        await openJob({ shapes: [polygon(9)] });
        const html = '<h1>Bad Gateway</h1><img src=x onerror="document.title = 1">';
        failOn(3, 502, html);

        assert.equal(await run(0, 5), null);
        await details().click();

        assert.match(await noticeText(), /the function does not answer \(502\)/);
        assert.ok((await noticeText()).endsWith(html));
        assert.equal(await notice().locator('h1, img').count(), 0);
    });

    for (const [status, reason] of [
        [400, 'the function refused the request (400)'],
        [403, 'CVAT refused the request: you may not run this function (403)'],
        [404, 'the function was not found (404)'],
        [408, 'the function took too long (408)'],
        [409, 'the tracking state does not fit: the model or the frame size has changed (409)'],
        [413, 'the request is too large: track fewer objects at a time (413)'],
        [422, 'the function cannot read the image of the frame (422)'],
        [500, 'the function failed (500)'],
        [503, 'the function does not answer (503)'],
        [504, 'the function took too long (504)'],
        [null, 'the server does not answer'],
    ]) {
        test(`CVAT's window reads plain words too: ${status ?? 'no network'}`, async () => {
            await openJob({ shapes: [polygon(9)] });
            cvat.interpose = () => status && { status, body: PYTHON_TEXT };

            assert.equal(await run(0, 5), `Frame 0 failed: ${reason}. Nothing was changed.`);
            assert.equal(await noticeText(), '');
            assert.ok(page.consoleTexts.at(-1).startsWith('SAM 2 tracker: Frame 0 failed'));
        });
    }

    test('an answer that cannot be used needs no details', async () => {
        await openJob({ shapes: [polygon(9)] });
        cvat.interpose = ({ type }) => ({
            status: 200, body: { shapes: [], states: type === 'track' ? [] : ['state'] },
        });

        assert.equal(
            await run(0, 5),
            'Frame 1 failed: the function answered 0 shapes for 1 object. Nothing was changed.',
        );
    });
});

describe('closing the notice', () => {
    beforeEach(async () => {
        await openJob({ shapes: [polygon(9)] });
        failOn(3, 500, PYTHON_TEXT);
        assert.equal(await run(0, 5), null);
    });

    test('its button closes it; opening and reading the details does not', async () => {
        await details().click();
        await notice().locator('pre').click();
        await notice().getByRole('alert').click();
        assert.equal(await notice().count(), 1);

        await closeButton().click();

        assert.equal(await notice().count(), 0);
    });

    test('Escape closes it, even if the window keeps the key to itself', async () => {
        await page.evaluate(() => {
            document.body.addEventListener('keydown', (event) => event.stopPropagation(), {
                once: true,
            });
        });
        await page.keyboard.press('Escape');

        assert.equal(await notice().count(), 0);
    });

    test('its keys do not reach the shortcuts of CVAT; other keys do', async () => {
        await page.evaluate(() => {
            globalThis.testPage.keys = [];
            for (const type of ['keydown', 'keypress', 'keyup']) {
                document.addEventListener(type, ({ key }) => globalThis.testPage.keys.push(key));
            }
        });
        await details().focus();
        await page.keyboard.press('Space');
        await page.keyboard.press('z');
        assert.equal(await notice().locator('pre').isVisible(), true);

        await closeButton().focus();
        await page.keyboard.press('Enter');

        assert.equal(await notice().count(), 0);
        const keys = await page.evaluate(() => globalThis.testPage.keys);
        assert.deepEqual(new Set(keys.slice(0, 3)), new Set(['z']));
        assert.equal(keys.includes(' '), false);
    });
});

describe('the look of the notice', () => {
    /** The box of the notice, its overflow, and each text with its colours. */
    const measure = () => notice().evaluate((box) => {
        const [light, dark] = [(c) => c / 255 / 12.92, (c) => ((c / 255 + 0.055) / 1.055) ** 2.4];
        const luminance = (colour) => colour.match(/\d+/g).slice(0, 3)
            .map((c) => (Number(c) <= 10 ? light(Number(c)) : dark(Number(c))))
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const background = (element) => {
            const colour = getComputedStyle(element).backgroundColor;
            return colour === 'rgba(0, 0, 0, 0)' ? background(element.parentElement) : colour;
        };
        const contrast = (element) => {
            const [a, b] = [getComputedStyle(element).color, background(element)].map(luminance);
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        };
        const texts = [...box.querySelectorAll('*')].filter(
            ({ childNodes }) => [...childNodes].some(({ nodeType }) => nodeType === Node.TEXT_NODE),
        );
        const { left, right, top, bottom } = box.getBoundingClientRect();
        return {
            left,
            right,
            top,
            bottom,
            tooWide: [box, ...box.querySelectorAll('*')].some(
                ({ scrollWidth, clientWidth }) => clientWidth && scrollWidth > clientWidth,
            ),
            isScrollable: box.scrollHeight > box.clientHeight,
            font: getComputedStyle(box).fontFamily,
            contrasts: texts.map(contrast),
        };
    });

    for (const [width, height] of [[390, 500], [1500, 900]]) {
        test(`it fits a page of ${width} x ${height}, with the longest texts`, async () => {
            await page.setViewportSize({ width, height });
            await openJob({ shapes: [polygon(9)] }, { labels: [{ id: 4, name: LONG_WORD }] });
            answer((object, frame) => (frame === 2 ? null : object));
            const { interpose } = cvat;
            cvat.interpose = (request) => (request.frame === 3
                ? { status: 500, body: LONG_WORD.repeat(10) } : interpose(request));

            assert.equal(await run(0, 5), null);
            await details().click();

            const { left, right, top, bottom, tooWide, isScrollable } = await measure();
            assert.ok(left >= 8 && right <= width - 8, `${left} to ${right}`);
            assert.ok(top >= 8 && bottom <= height - 8, `${top} to ${bottom}`);
            assert.equal(tooWide, false);
            assert.equal(isScrollable, true);
        });
    }

    test("it has the font of CVAT's UI, and texts with enough contrast", async () => {
        await page.addStyleTag({ content: '* { font-family: serif; color: yellow; }' });
        await openJob({ shapes: [polygon(9)] });
        failOn(3, 500, PYTHON_TEXT);
        assert.equal(await run(0, 5), null);
        await details().click();

        const { font, contrasts } = await measure();
        assert.match(font, /^-apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif$/);
        assert.ok(contrasts.length >= 6, `${contrasts.length} texts`);
        assert.ok(contrasts.every((contrast) => contrast >= 4.5), `${contrasts}`);
    });
});

describe('the picture behind the window', () => {
    const shownTypes = () => page.evaluate(
        () => globalThis.testPage.shown.map(({ objectType }) => objectType),
    );
    const cancel = { cancelAfter: 'Frame 3 (' };

    test("after Cancel the page is updated, which CVAT's window does not do", async () => {
        await openJob({ shapes: [polygon(9)] });

        assert.equal(await run(0, 8, cancel), null);

        await page.waitForFunction(() => globalThis.testPage.shown[0].objectType === 'track');
        assert.deepEqual(await events('changeFrame'), [0]);
        assert.match(await noticeText(), /If the picture is not up to date, change the frame\./);
    });

    test('Cancel during the last frame: all is tracked, and the page is updated too', async () => {
        await openJob({ shapes: [polygon(9)] });

        assert.equal(await run(0, 3, cancel), null);

        await page.waitForFunction(() => globalThis.testPage.shown[0].objectType === 'track');
        assert.match(await noticeText(), /Done: 1 object on 3 frames .* change the frame\./);
    });

    test('without Cancel the script leaves that to the window', async () => {
        await openJob({ shapes: [polygon(9)] });

        assert.equal(await run(0, 3), null);

        assert.deepEqual(await shownTypes(), ['track']);
        assert.deepEqual(await events('changeFrame'), []);
        assert.doesNotMatch(await noticeText(), /change the frame/);
    });

    test('in a CVAT without the interface for plugins, the notice says what to do', async () => {
        await openJob({ shapes: [polygon(9)] });
        await page.evaluate(() => {
            globalThis.testPage.cvatUI = globalThis.cvatUI;
            globalThis.cvatUI = undefined;
        });

        assert.equal(await run(0, 8, cancel), null);

        await page.evaluate(() => { globalThis.cvatUI = globalThis.testPage.cvatUI; });
        assert.deepEqual(await shownTypes(), ['shape']);
        assert.match(await noticeText(), /If the picture is not up to date, change the frame\./);
    });
});

describe('an activated object', () => {
    const others = /Only the activated object was tracked; the frame has (\d+) more\./;

    test('the notice says that the frame has more objects', async () => {
        await openJob({
            shapes: [
                polygon(9), polygon(10), shape(8, 'mask', BLOCK.mask),
                polygon(11, { lock: true }), shape(12, 'points', DISC.polygon), polygon(13, { frame: 1 }),
            ],
        });

        assert.equal(await run(0, 2, { clientID: 9 }), null);

        assert.equal((await noticeText()).match(others)?.[1], '2');
    });

    test('it says nothing of that if all objects were tracked', async () => {
        await openJob({ shapes: [polygon(9), polygon(10)] });
        assert.equal(await run(0, 2), null);
        assert.doesNotMatch(await noticeText(), others);

        await openJob({ shapes: [polygon(9)] });
        assert.equal(await run(0, 2, { clientID: 9 }), null);
        assert.doesNotMatch(await noticeText(), others);
    });
});
